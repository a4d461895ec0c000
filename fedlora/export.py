"""Final models for others: an ordinary PEFT folder, and a merged transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import LowRankAdapter, State
from fedlora.adapters.base import ADAPTER_NAME
from fedlora.adapters.injection import configured, logged_warnings, named_tensors, plain_name, seeded
from fedlora.adapters.personal import PersonalAdapter
from fedlora.adapters.targets import PRESETS, is_suffix
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.lowrank import LowRank

_TASK_TYPES = {AutoModelForSequenceClassification: TaskType.SEQ_CLS, AutoModelForCausalLM: TaskType.CAUSAL_LM}


def export_adapter(
    federation: Federation, folder: Path, state: State, frozen: State, correction: Mapping[str, Tensor], head: State
) -> None:
    """Write ``folder`` so that ``PeftModel.from_pretrained`` gives the same outputs.

    Every low-rank method becomes plain LoRA of the rank of its dW (Fed-SB as A and B R, RAVAN with the ranks of all
    heads), any other PEFT adapter is saved by PEFT.
    ``fedlora_state.safetensors`` keeps the method's own tensors, frozen ones included. A full-rank base correction
    (FedEx) is no adapter: it is written beside it and is part of the merged model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(federation.adapter, PersonalAdapter):
        pass  # no layer of a common backbone is adapted: its own tensors are all there is
    elif isinstance(federation.adapter, LowRankAdapter):
        _export_lora(federation, federation.adapter, folder, {**frozen, **state}, head)
    else:
        _peft_model(federation, {**frozen, **state}, head).save_pretrained(str(folder))
    save_file(_contiguous({**frozen, **state}), folder / "fedlora_state.safetensors")
    if correction:
        save_file(_contiguous(correction), folder / "base_correction.safetensors")


def export_merged(
    federation: Federation, folder: Path, state: State, frozen: State, correction: Mapping[str, Tensor], head: State
) -> None:
    """Write a whole transformers model with dW and the base correction added to its weights, and its tokenizer.

    Raises:
        InputError: PEFT cannot merge this adapter into the weights, or there is no backbone.
    """
    if isinstance(federation.adapter, PersonalAdapter):
        raise InputError(
            f"--merged: adapter={federation.adapter.label} trains {federation.backbone.described} whole, and has "
            "nothing to merge. Leave it out: the adapter folder of the run holds the weights."
        )
    if isinstance(federation.adapter, LowRankAdapter):
        model = _merged_factors(federation, federation.adapter.delta({**frozen, **state}), correction, head)
    else:
        model = _merged_by_peft(federation, {**frozen, **state}, head)
    model.save_pretrained(folder)
    if federation.backbone.has_tokenizer:
        federation.backbone.tokenizer().save_pretrained(folder)


def _export_lora(federation: Federation, adapter: LowRankAdapter, folder: Path, full: State, head: State) -> None:
    deltas = adapter.delta(full)
    layers = federation.build_meta_model().layers.values()
    rank = next(iter(deltas.values())).rank
    config = LoraConfig(
        r=rank,
        lora_alpha=adapter.alpha_at(rank),  # pyright: ignore[reportArgumentType]
        use_rslora=adapter.sizes.rslora,
        target_modules=_targets(adapter, deltas),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers),
        modules_to_save=_top_level(head),
        inference_mode=True,
        **_belonging(federation),
    )
    config.save_pretrained(str(folder))
    save_file(_peft_tensors(deltas, head, adapter.scale), folder / "adapter_model.safetensors")


def _targets(adapter: LowRankAdapter, deltas: Mapping[str, LowRank]) -> list[str] | str:
    """The setting where PEFT reads it as we do; the last names of PEFT's default; full names of a preset."""
    targets = adapter.config.target_modules
    if targets is None:
        return sorted({module.split(".")[-1] for module in deltas})
    if targets in PRESETS:
        return list(deltas)
    return [targets] if isinstance(targets, str) and is_suffix(targets) else targets


def _belonging(federation: Federation) -> dict[str, Any]:
    """Which backbone and which kind of model an adapter belongs to."""
    kind = _TASK_TYPES.get(federation.task.auto_class)
    return {"task_type": kind, "base_model_name_or_path": federation.backbone.path}


def _top_level(head: State) -> list[str] | None:
    return sorted({key.split(".")[0] for key in head}) or None


def _backbone(federation: Federation) -> PreTrainedModel:
    overrides: dict[str, Any] = federation.task.model_overrides(federation.schema)
    seed = federation.config.seed
    return cast(
        PreTrainedModel, federation.backbone.load(federation.task.auto_class, seed, quantized=False, **overrides)
    )


def _merged_factors(
    federation: Federation, deltas: Mapping[str, LowRank], correction: Mapping[str, Tensor], head: State
) -> PreTrainedModel:
    model = _backbone(federation)
    with torch.no_grad():
        for module, delta in deltas.items():
            change = delta.dense() + correction[module] if module in correction else delta.dense()
            layer = model.get_submodule(module)
            weight = cast(nn.Parameter, layer.weight)
            weight.add_(change.T if isinstance(layer, Conv1D) else change)
        for key, value in head.items():
            model.get_parameter(key).copy_(value)
    return model


def _merged_by_peft(federation: Federation, full: State, head: State) -> PreTrainedModel:
    try:
        model = cast(PreTrainedModel, _peft_model(federation, full, head).merge_and_unload())
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise InputError(
            f"adapter {federation.adapter.label} cannot be merged into the backbone's weights ({error}). "
            "Leave out --merged: the adapter folder of the run holds the model."
        ) from error
    for name in _top_level(head) or []:
        wrapper = model.get_submodule(name)
        if isinstance(wrapper, ModulesToSaveWrapper):  # LN tuning leaves them in
            setattr(model, name, wrapper.modules_to_save[ADAPTER_NAME])
    return model


def _peft_model(federation: Federation, full: State, head: State) -> PeftModel:
    """PEFT's own model of the run's backbone and adapter, holding the tensors ``full`` and ``head``."""
    module, adapter = _backbone(federation), federation.adapter
    before = {id(tensor) for tensor in named_tensors(module).values()}
    config = configured(adapter, module, federation.task.head_modules)
    for name, value in {**_belonging(federation), "inference_mode": True}.items():
        setattr(config, name, value)
    if head:
        config.modules_to_save = _top_level(head)  # pyright: ignore[reportAttributeAccessIssue]
    with seeded(federation.config.seed), logged_warnings():
        model = PeftModel(module, config, ADAPTER_NAME)
    tensors = {
        plain_name(key): value for key, value in named_tensors(model.base_model).items() if id(value) not in before
    }
    with torch.no_grad():
        for key, value in full.items():
            tensors[key].copy_(value)
        for key, value in head.items():
            top, _, rest = key.partition(".")
            tensors[f"{top}.modules_to_save.{rest}"].copy_(value)
    return model


def _peft_tensors(deltas: Mapping[str, LowRank], head: State, scale: float) -> dict[str, Tensor]:
    tensors = {f"base_model.model.{key}": value for key, value in head.items()}
    for module, delta in deltas.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = delta.right
        tensors[f"base_model.model.{module}.lora_B.weight"] = delta.left / scale
    return _contiguous(tensors)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().clone().contiguous() for key, value in tensors.items()}
