"""The frozen pretrained model: where it lies, its tokenizer, its configuration, its weights.

``minilm`` and ``smollm2`` come from packages; ``hf`` is any transformers model named by a hub id or a local folder;
``random`` is an architecture whose weights are drawn from the seed; ``heterogeneous`` is no frozen model but one for
each client (:mod:`fedlora.personal.backbone`). Dropout is set to zero everywhere, so that a seed determines a result.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import psutil
import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from fedlora.config import BackboneConfig, nearest
from fedlora.errors import InputError
from fedlora.packaged import minilm_folder, smollm2_folder
from fedlora.resident import Loaded, Resident, copy_of
from fedlora.seeding import derive_seed

RESIDENT = Resident()
"""What this process has loaded last, whichever run asks for it."""


@dataclass(frozen=True)
class Backbone:
    """A pretrained model by its location; nothing is loaded until asked for.

    Attributes:
        settings: the configured backbone.
        path: a local folder or a hub id that transformers can load; ``None`` for a random architecture.
    """

    settings: BackboneConfig
    path: str | None

    @classmethod
    def from_config(cls, config: BackboneConfig) -> Backbone:
        """Resolve the configured backbone.

        Raises:
            InputError: the package or the path is missing, or the machine cannot quantise.
        """
        if config.name == "heterogeneous":
            from fedlora.personal.backbone import HeterogeneousBackbone

            return HeterogeneousBackbone.from_config(config)
        if config.quantization != "none":
            _require_bitsandbytes(config.quantization)
        if config.name == "random":
            if config.architecture is None:
                raise InputError(
                    "backbone=random needs backbone.architecture, a model type such as bert, llama or vit."
                )
            return cls(config, None)
        if config.name == "hf":
            if not config.path:
                raise InputError(
                    "backbone=hf needs backbone.path: a hub id such as backbone.path=roberta-base, or a local folder."
                )
            return cls(config, config.path)
        packaged = {"minilm": minilm_folder, "smollm2": smollm2_folder}[config.name]
        return cls(config, config.path or str(packaged()))

    @property
    def client_models(self) -> list[str] | None:
        """The models that clients have of their own; ``None`` where all have this one."""
        return None

    @property
    def any_picture(self) -> bool:
        """Whether the model is built for the pictures of the data, whatever their size."""
        return False

    @property
    def described(self) -> str:
        """How messages call it."""
        return (
            f"backbone.path = '{self.path}'" if self.path else f"backbone.architecture = {self.settings.architecture}"
        )

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer; models of images have none."""
        try:
            self.tokenizer()
        except InputError:
            return False
        return True

    @property
    def pad_id(self) -> int:
        """The token that fills short rows; 0 where there is no tokenizer."""
        if self.path is None and self.settings.tokenizer is None:
            return 0
        return int(self.tokenizer().pad_token_id or 0)  # pyright: ignore[reportArgumentType]

    def config(self, **overrides: Any) -> PretrainedConfig:
        """Return the model's configuration with every dropout set to zero and ``overrides`` applied."""
        try:
            if self.path is None:
                self._check_settings()
                values = {**self.settings.settings, **overrides}
                config = AutoConfig.for_model(str(self.settings.architecture), **values)
            else:
                config = AutoConfig.from_pretrained(self.path, **overrides)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{self.described} could not be read as a transformers model: {_first_line(error)} "
                "Give a folder with config.json and weights, or a hub id that this machine can reach."
            ) from error
        for key, value in config.to_dict().items():
            if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
                setattr(config, key, 0.0)
        return config

    def _check_settings(self) -> None:
        """Refuse what a configuration class of transformers would keep and never read."""
        known = AutoConfig.for_model(str(self.settings.architecture))
        unknown = [key for key in self.settings.settings if not hasattr(known, key)]
        if unknown:
            names = [name for name in known.to_dict() if not name.startswith("_")]
            raise InputError(
                f"Unknown setting 'backbone.settings.{unknown[0]}': {type(known).__name__} has no such value."
                f"{nearest(unknown[0], names)}"
            )

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the backbone's tokenizer, with a padding token (the end-of-text token where none is defined).

        Raises:
            InputError: there is none.
        """
        location = self.settings.tokenizer or self.path
        if location is None:
            raise InputError(
                f"backbone={self.settings.name} has no tokenizer of its own here: set backbone.tokenizer to a folder "
                "or hub id."
            )
        return _tokenizer(location)

    def tokenizer_key(self) -> str:
        """A hash of the tokenizer: its kind, vocabulary, rules, special tokens and chat template."""
        tokenizer = self.tokenizer()
        fast = getattr(tokenizer, "backend_tokenizer", None)
        rules = {} if fast is None else json.loads(fast.to_str())
        kept = {name: rules.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor")}
        special, template = sorted(tokenizer.special_tokens_map.items()), tokenizer.chat_template
        sides = tokenizer.truncation_side, kept, special
        parts = (type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), template, sides)
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

    def max_length(self) -> int | None:
        """The longest sequence the model can read, or ``None`` where its configuration does not say."""
        config = self.config()
        known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
        longest = next((value for value in known if isinstance(value, int) and value > 0), None)
        if longest is not None and config.model_type in COUNTS_FROM_PADDING:
            return longest - (config.pad_token_id or 0) - 1
        return longest

    def require_decoder(self, task: str) -> None:
        """Refuse a backbone that cannot continue a text.

        Raises:
            InputError: the architecture is an encoder.
        """
        config = self.config()
        bidirectional = getattr(config, "is_decoder", None) is False and config.model_type in ENCODERS
        if bidirectional or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise InputError(
                f"task={task} needs a language model, and {self.described} is of type '{config.model_type}', which "
                "does not continue texts. Use backbone=smollm2, or backbone=hf backbone.path=<a causal language model>."
            )

    def load(
        self,
        auto_class: Any,
        seed: int,
        *,
        quantized: bool = True,
        heads: Iterable[str] = (),
        dtype: torch.dtype = torch.float32,
        **overrides: Any,
    ) -> nn.Module:
        """Load the weights through ``auto_class``; parts missing from the checkpoint are drawn from ``seed``.

        Args:
            auto_class: a transformers auto class, or a class with the same ``from_pretrained`` and ``from_config``.
            seed: the seed of the run.
            quantized: whether to apply ``backbone.quantization``.
            heads: modules of the task head: never quantised, and drawn anew where the checkpoint's have other shapes.
            dtype: of the weights; the heads are fp32 in any case, and take whatever comes to them.
            overrides: configuration values of the model.

        Raises:
            InputError: the weights cannot be read, or the architecture cannot do what the settings ask.
        """
        heads, seed = tuple(heads), derive_seed(seed, "head")
        load = partial(self._loaded, auto_class, seed, quantized, heads, dtype, overrides)
        if self.path is None or (quantized and self.settings.quantization != "none"):
            return load().module
        key = (self.settings.model_dump_json(), self.path, auto_class, heads, dtype, repr(sorted(overrides.items())))
        return copy_of(RESIDENT.get(key, load), seed)

    def _loaded(
        self,
        auto_class: Any,
        seed: int,
        quantized: bool,
        heads: tuple[str, ...],
        dtype: torch.dtype,
        overrides: dict[str, Any],
    ) -> Loaded:
        """The model with the weights of its checkpoint, and what that lacks; everything else drawn from ``seed``."""
        config = self.config(**overrides)
        self._require_memory(auto_class, quantized, overrides, dtype)
        options: dict[str, Any] = {"dtype": dtype}
        loaded: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # of the head only
        lacking: set[str] = set()
        if self.settings.attention is not None:
            options["attn_implementation"] = self.settings.attention
        if quantized and self.settings.quantization != "none":
            options["quantization_config"] = _quantization(self.settings.quantization, heads, dtype)
        try:
            with torch.random.fork_rng(devices=[]), _quiet_transformers():
                torch.manual_seed(seed)
                if self.path is None:
                    model = auto_class.from_config(config, **options)
                else:
                    model, report = auto_class.from_pretrained(self.path, config=config, **options, **loaded)
                    self._check_shapes(report, heads)
                    lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"{self.described} does not load: {_first_line(error)}") from error
        for layer in model.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False  # else a forward pass in bf16 repacks 4-bit weights in place
        if self.settings.gradient_checkpointing:
            _checkpoint_gradients(model, self.described)
        if dtype != torch.float32:
            for name, head in model.named_children():
                if name in heads:
                    head.float().register_forward_pre_hook(_in_fp32)
        model.config.use_cache = False  # nothing but generation, which asks for it, reads what would be kept
        return Loaded(model.eval().requires_grad_(False), frozenset(map(str, lacking)))

    def _require_memory(self, auto_class: Any, quantized: bool, overrides: dict[str, Any], dtype: torch.dtype) -> None:
        """Refuse weights that do not fit this machine; models are held whole by one process."""
        plain = self.settings.quantization == "none" or not quantized
        each = float(dtype.itemsize) if plain else BYTES_PER_WEIGHT[self.settings.quantization]
        needed = each * sum(parameter.numel() for parameter in self.meta(auto_class, **overrides).parameters())
        available = psutil.virtual_memory().available
        if needed > available:
            raise InputError(
                f"{self.described} needs {needed / 1e9:.1f} GB for its weights and this machine has "
                f"{available / 1e9:.1f} GB free. A backbone is held whole by one process (there is no device_map). Use "
                "backbone.quantization=int8 or nf4, a smaller backbone or a larger machine; 'fedlora plan' needs no "
                "weights and works here."
            )

    def _check_shapes(self, report: dict[str, Any], heads: tuple[str, ...]) -> None:
        wrong = sorted(str(key) for key, *_ in report["mismatched_keys"] if not str(key).startswith(heads))
        if wrong:
            raise InputError(
                f"{self.described}: the weights do not fit their own configuration ({', '.join(wrong[:3])} have other "
                "shapes). Give a folder whose config.json belongs to its weights."
            )

    def meta(self, auto_class: Any, **overrides: Any) -> nn.Module:
        """Build the model on the meta device from its configuration alone: shapes without weights."""
        config = self.config(**overrides)
        try:
            with torch.device("meta"):
                model = auto_class.from_config(config)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise InputError(
                f"{self.described} is of type '{config.model_type}', which transformers cannot build as "
                f"{auto_class.__name__} for this task. Choose another backbone or another task."
            ) from error
        return model.eval().requires_grad_(False)


BYTES_PER_WEIGHT = {"none": 4.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}
"""Memory of a frozen weight; NF4 holds 4 bits and one fp32 scale for each block of 64 (Dettmers et al. 2023)."""

# Families that transformers can dress as decoders although their weights never learned to continue a text.
ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "electra", "camembert", "roformer", "rembert", "megatron-bert"})

# Families whose first position is that after the padding token's number.
COUNTS_FROM_PADDING = frozenset({"roberta", "xlm-roberta", "camembert", "xmod", "longformer"})


def _require_bitsandbytes(kind: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(
            f"backbone.quantization={kind} needs the package bitsandbytes, which is not installed on this machine. "
            "Run 'pip install bitsandbytes', or use backbone.quantization=none."
        )


def _in_fp32(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(value.float() for value in args)


def _quantization(kind: str, heads: Iterable[str], dtype: torch.dtype) -> BitsAndBytesConfig:
    kept = [*heads, "lm_head"]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def _checkpoint_gradients(model: Any, described: str) -> None:
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(f"backbone.gradient_checkpointing=true: {described} does not support it. Set it to false.")
    model.activation_checkpointing_enable()


@lru_cache(maxsize=4)
def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            raise ValueError("its vocabulary is empty")  # what transformers makes where there is no file of one
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{path}' has no tokenizer ({_first_line(error)}): set backbone.tokenizer to a folder or hub id with one."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


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
