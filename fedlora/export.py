"""Final models for others: an ordinary PEFT LoRA folder, and a merged transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, TaskType
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import State
from fedlora.federation import Federation
from fedlora.lowrank import LowRank

_TASK_TYPES = {AutoModelForSequenceClassification: TaskType.SEQ_CLS, AutoModelForCausalLM: TaskType.CAUSAL_LM}


def export_adapter(
    federation: Federation, folder: Path, state: State, frozen: State, correction: Mapping[str, Tensor], head: State
) -> None:
    """Write ``folder`` so that ``PeftModel.from_pretrained`` gives the same outputs.

    Every low-rank method becomes plain LoRA (Fed-SB as A and B R). ``fedlora_state.safetensors`` keeps the method's own
    tensors, basis included. A full-rank base correction (FedEx) is no LoRA: it is written beside it and is part of the
    merged model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapter = federation.adapter
    deltas = adapter.delta({**frozen, **state})
    layers = federation.build_meta_model().layers.values()
    config = LoraConfig(
        r=adapter.config.rank,
        lora_alpha=adapter.config.alpha,  # pyright: ignore[reportArgumentType]
        use_rslora=adapter.config.rslora,
        target_modules=sorted({module.split(".")[-1] for module in deltas})
        if adapter.config.target_modules is None
        else adapter.config.target_modules,
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers),
        modules_to_save=sorted({key.split(".")[0] for key in head}) or None,
        task_type=_TASK_TYPES.get(federation.task.auto_class),
        base_model_name_or_path=federation.backbone.path,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(_peft_tensors(deltas, head, adapter.scale), folder / "adapter_model.safetensors")
    save_file(_contiguous({**frozen, **state}), folder / "fedlora_state.safetensors")
    if correction:
        save_file(_contiguous(correction), folder / "base_correction.safetensors")


def export_merged(
    federation: Federation, folder: Path, state: State, frozen: State, correction: Mapping[str, Tensor], head: State
) -> None:
    """Write a whole transformers model with dW and the base correction added to its weights, and its tokenizer."""
    overrides: dict[str, Any] = federation.task.model_overrides(federation.schema, federation.backbone.tokenizer())
    model = cast(
        PreTrainedModel, federation.backbone.load(federation.task.auto_class, federation.config.seed, **overrides)
    )
    deltas = federation.adapter.delta({**frozen, **state})
    with torch.no_grad():
        for module, delta in deltas.items():
            change = delta.dense() + correction[module] if module in correction else delta.dense()
            layer = model.get_submodule(module)
            weight = cast(nn.Parameter, layer.weight)
            weight.add_(change.T if isinstance(layer, Conv1D) else change)
        for key, value in head.items():
            model.get_parameter(key).copy_(value)
    model.save_pretrained(folder)
    federation.backbone.tokenizer().save_pretrained(folder)


def _peft_tensors(deltas: Mapping[str, LowRank], head: State, scale: float) -> dict[str, Tensor]:
    tensors = {f"base_model.model.{key}": value for key, value in head.items()}
    for module, delta in deltas.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = delta.right
        tensors[f"base_model.model.{module}.lora_B.weight"] = delta.left / scale
    return _contiguous(tensors)


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().clone().contiguous() for key, value in tensors.items()}
