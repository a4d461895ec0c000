from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from fedlora.backbone import Backbone
from fedlora.config import BackboneConfig
from fedlora.errors import InputError
from fedlora.federation import Federation
from simulations.compose import compose_config
from simulations.simulate import start
from tests.conftest import Compose


def local(folder: Path, **settings: object) -> Backbone:
    return Backbone.from_config(BackboneConfig(name="hf", path=str(folder), **settings))  # type: ignore[arg-type]


def test_a_head_of_another_size_is_drawn_anew_from_the_seed(tiny: Compose, tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "tuned")
    config = BertConfig.from_pretrained(tiny_bert, num_labels=7)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "tuned")
    heads = [
        Federation(tiny(f"backbone.path={tmp_path / 'tuned'}", f"seed={seed}")).build_model().module.classifier.weight
        for seed in (1, 1, 2)
    ]
    assert heads[0].shape == (2, 32)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_weights_that_do_not_fit_their_configuration_are_refused(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(InputError, match="the weights do not fit their own configuration"):
        local(tmp_path / "odd").load(AutoModelForSequenceClassification, 1, heads=("classifier",))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"could not be read as a transformers model.*Give a folder"):
        local(tmp_path).config()


def test_a_folder_without_weights_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_bert / "config.json", tmp_path)
    with pytest.raises(InputError, match="does not load"):
        local(tmp_path).load(AutoModelForSequenceClassification, 1)


def test_a_random_backbone_is_drawn_from_the_seed() -> None:
    settings = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings |= {"intermediate_size": 16, "num_key_value_heads": 2}
    backbone = Backbone.from_config(BackboneConfig(name="random", architecture="llama", settings=settings))
    one, same, other = (backbone.load(AutoModelForCausalLM, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_a_random_backbone_needs_an_architecture() -> None:
    with pytest.raises(InputError, match=r"backbone=random needs backbone\.architecture"):
        Backbone.from_config(BackboneConfig(name="random"))
    with pytest.raises(InputError, match="could not be read"):
        Backbone.from_config(BackboneConfig(name="random", architecture="lama")).config()


def test_a_setting_that_an_architecture_does_not_have_is_refused_with_the_nearest() -> None:
    wrong = BackboneConfig(name="random", architecture="bert", settings={"hiden_size": 32})
    with pytest.raises(InputError, match=r"'backbone\.settings\.hiden_size'.*Did you mean 'hidden_size'"):
        Backbone.from_config(wrong).config()
    mapped = BackboneConfig(name="random", architecture="gpt2", settings={"hidden_size": 32, "num_labels": 3})
    assert Backbone.from_config(mapped).config().n_embd == 32


def test_a_backbone_that_cannot_do_the_task_is_refused() -> None:
    backbone = Backbone.from_config(BackboneConfig(name="random", architecture="vit"))
    with pytest.raises(InputError, match="'vit', which transformers cannot build as AutoModelForSequenceClassifi"):
        backbone.meta(AutoModelForSequenceClassification)


def test_tokenizers_that_differ_in_their_rules_only_have_different_keys(tiny_bert: Path, tmp_path: Path) -> None:
    def key(folder: Path) -> str:
        return Backbone.from_config(BackboneConfig(name="hf", path=str(folder))).tokenizer_key()

    other = shutil.copytree(tiny_bert, tmp_path / "other")
    assert key(other) == key(tiny_bert)
    for setting, value in (("do_lower_case", False), ("strip_accents", False), ("truncation_side", "left")):
        folder = shutil.copytree(tiny_bert, tmp_path / setting)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**settings, setting: value}))
        assert key(folder) != key(tiny_bert), setting


def test_an_encoder_is_refused_as_a_language_model(tiny_lm: Compose, tiny_bert: Path) -> None:
    with pytest.raises(InputError, match=r"task=causal_lm needs a language model.*'bert'.*Use backbone=smollm2"):
        Federation(tiny_lm(f"backbone.path={tiny_bert}"))


@pytest.mark.slow
def test_smollm2_reads_and_continues_text() -> None:
    backbone = Backbone.from_config(BackboneConfig(name="smollm2"))
    tokenizer = backbone.tokenizer()
    model = backbone.load(AutoModelForCausalLM, 1)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    turns = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**asked, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    assert "Paris" in tokenizer.decode(written[0, asked["input_ids"].shape[1] :])


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantisation_without_its_library_says_what_to_install(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = Backbone.from_config.__globals__["importlib"].util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(InputError, match=r"backbone\.quantization=.*needs the package bitsandbytes"):
        Backbone.from_config(BackboneConfig(name="minilm", quantization=kind))  # type: ignore[arg-type]


def test_a_metric_that_the_task_does_not_have_is_refused_with_the_nearest(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"task\.metric = 'acuracy' is no metric.*Did you mean 'accuracy'"):
        start(tiny("task.metric=acuracy"), tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("metric", ["loss", "ece"])
def test_a_metric_that_is_better_when_lower_is_refused(tiny: Compose, tmp_path: Path, metric: str) -> None:
    with pytest.raises(InputError, match=rf"task\.metric = '{metric}' is better when lower.*Use one of accuracy, "):
        start(tiny(f"task.metric={metric}", "task.calibration=true"), tmp_path / "run")


def test_a_task_by_path_needs_no_other_word() -> None:
    config = compose_config(["task.name=./mine.py:Mine", "task.size=3"])
    assert config.task == {"name": "./mine.py:Mine", "metric": None, "size": 3}


def test_a_backbone_larger_than_the_machine_is_refused_before_it_is_loaded() -> None:
    settings = {"hidden_size": 32768, "num_hidden_layers": 200, "intermediate_size": 131072}
    backbone = Backbone.from_config(BackboneConfig(name="random", architecture="llama", settings=settings))
    with pytest.raises(InputError, match=r"needs \d+\.\d GB for its weights and this machine has \d+\.\d GB free"):
        backbone.load(AutoModelForCausalLM, 1)
