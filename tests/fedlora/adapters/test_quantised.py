"""Backbones held in 8 or 4 bits: the adapters on them train, and bases come from the decoded weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from fedlora.adapters.fed_sb import oriented_weight
from fedlora.errors import InputError
from fedlora.federation import Federation
from simulations.simulate import start
from tests.conftest import TINY_VOCABULARY

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:MatMul8bitLt.*inputs will be cast:UserWarning"),
    pytest.mark.filterwarnings("ignore:_check_is_size will be removed:FutureWarning"),
]
FORMATS = pytest.mark.parametrize("quantization", ["int8", "nf4"])
ADAPTERS = {
    "lora": ["method=fedit"],
    "ffa": ["method=ffa"],
    "fed_sb[weight]": ["method=fed_sb", "adapter.basis=weight"],
    "fed_sb[seeded]": ["method=fed_sb", "adapter.basis=seeded"],
    "peft": ["strategy=average", "adapter=peft", "adapter.config._target_=peft.IA3Config"],
}


@pytest.fixture(scope="module")
def wide_bert(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    """A BERT of hidden size 64, the length of a block of 4-bit weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("wide-bert")
    shutil.copytree(tiny_bert, folder, dirs_exist_ok=True)
    config = BertConfig(
        vocab_size=TINY_VOCABULARY, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=128
    )
    BertModel(config).save_pretrained(folder)
    return folder


@FORMATS
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_round_trains_on_a_quantised_backbone(tiny, tmp_path: Path, adapter: str, quantization: str) -> None:
    summary = start(tiny(*ADAPTERS[adapter], f"backbone.quantization={quantization}", "rounds=1"), tmp_path / "run")
    # IA3 trains factors that start at 1, where fp32 keeps fewer digits of a small change.
    limit = {"lora": 1.0, "peft": 1e-4}.get(adapter, 1e-6)
    assert summary["aggregation_error"]["max"] < limit
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@FORMATS
def test_presets_and_bases_see_the_decoded_weights(tiny, wide_bert: Path, quantization: str) -> None:
    overrides = [
        f"backbone.path={wide_bert}",
        "method=fed_sb",
        "adapter.basis=weight",
        "adapter.target_modules=attention",
    ]
    plain = Federation(tiny(*overrides)).build_model()
    coarse = Federation(tiny(*overrides, f"backbone.quantization={quantization}")).build_model()
    assert list(coarse.layers) == list(plain.layers)
    for name, layer in coarse.layers.items():
        exact, decoded = oriented_weight(plain.layers[name]), oriented_weight(layer)
        assert 0 < (decoded - exact).norm() / exact.norm() < 0.15
    assert all(value.dtype == torch.float32 for value in coarse.read(coarse.frozen).values())


@FORMATS
@pytest.mark.parametrize(
    "start", [["method=fed_sb"], ["method=fed_sb", "adapter.basis=client_gradient"], ["method=lora_ga"]]
)
def test_a_start_from_gradients_of_quantised_weights_is_refused(tiny, start: list[str], quantization: str) -> None:
    with pytest.raises(InputError, match=r"which quantised ones do not have.*adapter\.basis=weight"):
        Federation(tiny(*start, f"backbone.quantization={quantization}"))
