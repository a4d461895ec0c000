from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from fedlora.backbone import RESIDENT, Backbone
from fedlora.config import BackboneConfig
from fedlora.resident import Loaded, Resident
from fedlora.seeding import derive_seed
from simulations.simulate import start
from tests.conftest import Compose
from tests.simulations.test_resume import assert_same_run

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=40), add_pooling_layer=False),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(vocab_size=50, dim=16, n_layers=1, n_heads=2)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, pad_token_id=0)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True, pad_token_id=0)),
}  # fmt: skip


def saved(name: str, folder: Path) -> Backbone:
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder)
    return Backbone.from_config(BackboneConfig(name="hf", path=str(folder)))


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_has_the_bits_of_a_fresh_load_by_transformers(name: str, tmp_path: Path) -> None:
    backbone = saved(name, tmp_path)
    for seed in (1, 2, 1):
        copy = backbone.load(AutoModelForSequenceClassification, seed, heads=("classifier", "score"), num_labels=3)
        torch.manual_seed(derive_seed(seed, "head"))
        fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path, config=backbone.config(num_labels=3))
        expected = dict(fresh.named_parameters())
        assert dict(copy.named_parameters()).keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in copy.named_parameters())


def test_copies_share_loaded_weights_and_nothing_else(tmp_path: Path) -> None:
    backbone = saved("bert", tmp_path)
    first, second = (
        dict(backbone.load(AutoModelForSequenceClassification, 1, num_labels=3).named_parameters()) for _ in range(2)
    )
    shared = {key for key in first if first[key].data_ptr() == second[key].data_ptr()}
    assert first.keys() - shared == {"classifier.weight", "classifier.bias"}
    assert not any(parameter.requires_grad for parameter in first.values())
    assert not any(first[key] is second[key] for key in first)


def test_tied_weights_stay_tied_in_a_copy(tmp_path: Path) -> None:
    model = saved("llama", tmp_path).load(AutoModelForCausalLM, 1)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # pyright: ignore


def test_another_model_is_let_go_before_the_next_is_loaded() -> None:
    resident, seen = Resident(), []

    def load() -> Loaded:
        seen.append(resident._loaded)
        return Loaded(torch.nn.Linear(1, 1), frozenset())

    a = resident.get("a", load)
    assert resident.get("a", load) is a
    assert resident.get("b", load) is not a
    assert seen == [None, None]


@pytest.mark.parametrize("method", ["fedex", "fed_sb"])
def test_a_run_beside_a_resident_backbone_has_the_bits_of_the_first(tiny: Compose, tmp_path: Path, method: str) -> None:
    for folder in ("first", "second"):
        start(tiny(f"method={method}", "rounds=2"), tmp_path / folder)
        start(tiny("method=fedit", "seed=3", "rounds=1"), tmp_path / f"{folder} other")
    assert RESIDENT._loaded is not None
    assert_same_run(tmp_path / "first", tmp_path / "second")
