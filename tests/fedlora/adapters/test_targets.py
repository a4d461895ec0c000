from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, ViTConfig

from fedlora.adapters.targets import resolve_targets
from fedlora.federation import Federation
from tests.fedlora.helpers import started

BERT_ATTENTION = {"self.query", "self.key", "self.value", "output.dense"}
EXPECTED = {
    ("tiny_bert", "attention"): {f"bert.encoder.layer.{i}.attention.{x}" for i in (0, 1) for x in BERT_ATTENTION},
    ("tiny_gpt2", "attention"): {f"transformer.h.{i}.attn.{x}" for i in (0, 1) for x in ("c_attn", "c_proj")},
    ("tiny_llama", "attention"): {f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in ("q", "k", "v", "o")},
    ("tiny_llama", "all-linear"): {
        *(f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in ("q", "k", "v", "o")),
        *(f"model.layers.{i}.mlp.{x}_proj" for i in (0, 1) for x in ("gate", "up", "down")),
    },
    ("tiny_gpt2", "all-linear"): {
        *(f"transformer.h.{i}.attn.{x}" for i in (0, 1) for x in ("c_attn", "c_proj")),
        *(f"transformer.h.{i}.mlp.{x}" for i in (0, 1) for x in ("c_fc", "c_proj")),
    },
    ("tiny_bert", "all-linear"): {
        "bert.pooler.dense",
        *(f"bert.encoder.layer.{i}.attention.{x}" for i in (0, 1) for x in BERT_ATTENTION),
        *(f"bert.encoder.layer.{i}.{x}.dense" for i in (0, 1) for x in ("intermediate", "output")),
    },
}


@pytest.mark.parametrize(("architecture", "preset"), EXPECTED, ids="-".join)
def test_a_preset_finds_the_layers_by_the_structure_of_the_model(
    tiny, tiny_lm, request: pytest.FixtureRequest, architecture: str, preset: str
) -> None:
    compose = tiny if architecture == "tiny_bert" else tiny_lm
    folder = request.getfixturevalue(architecture)
    federation = Federation(compose(f"backbone.path={folder}", f"adapter.target_modules={preset}"))
    assert set(federation.build_meta_model().layers) == EXPECTED[architecture, preset]
    assert set(federation.build_model().layers) == EXPECTED[architecture, preset]


def test_presets_know_vision_transformers() -> None:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    attention = resolve_targets("attention", model, ("classifier",))
    everything = resolve_targets("all-linear", model, ("classifier",))
    assert isinstance(attention, list)
    assert isinstance(everything, list)
    assert len(attention) == 4
    assert len(everything) == 6
    assert all("attention" in name for name in attention)
    assert not any(name.startswith("classifier") for name in everything)


def test_the_task_head_of_a_decoder_is_no_target(tiny_llama: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama)
    assert "score" not in (resolve_targets("all-linear", model, ("score",)) or ())


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        ("query", 2),
        ("attention.output.dense", 2),
        ("[query,key]", 4),
        ("'.*attention.self.(key|value)'", 4),
        ("null", 4),
    ],
)
@pytest.mark.parametrize(
    "adapter", [["adapter=lora", "adapter.rank=4"], ["adapter=dora", "adapter.config.r=4"]], ids=str
)
def test_targets_are_a_list_a_suffix_an_expression_or_the_default_of_peft(
    tiny, adapter: list[str], targets: str, layers: int
) -> None:
    federation = Federation(tiny(*adapter, f"adapter.target_modules={targets}"))
    assert len(federation.build_meta_model().layers) == layers


@pytest.mark.parametrize("adapter", ["method=ffa", "method=fed_sb"])
def test_presets_serve_every_adapter(tiny, adapter: str) -> None:
    assert len(started(Federation(tiny(adapter, "adapter.target_modules=attention"))).layers) == 8
