from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from fedlora.adapters import State
from fedlora.export import export_adapter, export_merged
from fedlora.federation import Federation
from fedlora.model import AdaptedModel
from tests.fedlora.helpers import (
    ADAPTERS,
    SCALES,
    assert_same,
    bare_backbone,
    first_batch,
    logits,
    of_architecture,
    random_state,
    started,
)

# PEFT's own loader still asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def trained_model(federation: Federation) -> AdaptedModel:
    """A model whose shared and private tensors are far from their start."""
    model = started(federation)
    model.load(random_state(model, model.trainable))
    return model


def parts(model: AdaptedModel) -> tuple[State, State, State]:
    """What a run hands to the exporters: the adapter's trained and frozen factors, and the head."""
    adapter = model.read(key for key in model.trainable if key not in model.head)
    return adapter, model.read(model.frozen), model.read(model.head)


def corrections_of(model: AdaptedModel) -> State:
    generator = torch.Generator().manual_seed(5)
    return {n: 0.05 * torch.randn(x.out_features, x.in_features, generator=generator) for n, x in model.layers.items()}


def reloaded(federation: Federation, folder: Path) -> torch.nn.Module:
    """What a user does: PEFT's loader on a fresh backbone. Any warning would fail the test."""
    return PeftModel.from_pretrained(bare_backbone(federation), str(folder)).eval()


@pytest.fixture(params=["tiny_bert", "tiny_gpt2"])
def architecture(request: pytest.FixtureRequest) -> list[str]:
    return of_architecture(request.param, request.getfixturevalue(request.param))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_peft_loads_the_exported_adapter_to_the_same_outputs(
    tiny, tmp_path: Path, architecture, adapter: str, scale: str
):
    federation = Federation(tiny(*architecture, *ADAPTERS[adapter], *SCALES[scale]))
    model, batch = trained_model(federation), first_batch(federation)
    state, frozen, head = parts(model)
    export_adapter(federation, tmp_path / "adapter", state, frozen, {}, head)
    expected = logits(model.module, batch)
    torch.testing.assert_close(
        logits(reloaded(federation, tmp_path / "adapter"), batch), expected, rtol=1e-4, atol=1e-5
    )
    assert (expected - logits(bare_backbone(federation), batch)).abs().max() > 1e-2
    assert not (tmp_path / "adapter" / "base_correction.safetensors").exists()


@pytest.mark.parametrize("head", ["private", "frozen"])
def test_the_head_is_exported_wherever_it_belongs(tiny, tmp_path: Path, head: str):
    federation = Federation(tiny(f"adapter.head={head}", "seed=3"))
    model, batch = trained_model(federation), first_batch(federation)
    export_adapter(federation, tmp_path, *parts(model)[:2], {}, parts(model)[2])
    other_seed = Federation(tiny(f"adapter.head={head}", "seed=4"))  # its fresh head differs
    torch.testing.assert_close(logits(reloaded(other_seed, tmp_path), batch), logits(model.module, batch))


@pytest.mark.parametrize(
    "target", ["null", "[query]", "query", "attention", "all-linear", "'.*attention.self.(key|value)'"]
)
def test_every_way_of_naming_targets_is_exported(tiny, tmp_path: Path, target: str):
    federation = Federation(tiny(f"adapter.target_modules={target}"))
    model, batch = trained_model(federation), first_batch(federation)
    state, frozen, head = parts(model)
    export_adapter(federation, tmp_path, state, frozen, {}, head)
    torch.testing.assert_close(logits(reloaded(federation, tmp_path), batch), logits(model.module, batch))


@pytest.mark.parametrize("method", ["fedit", "fed_sb"])
def test_a_language_model_without_a_head_of_its_own_is_exported(tiny_lm, tmp_path: Path, method: str):
    federation = Federation(tiny_lm(f"method={method}"))
    model, batch = trained_model(federation), first_batch(federation)
    state, frozen, head = parts(model)
    assert head == {}
    export_adapter(federation, tmp_path, state, frozen, {}, head)
    torch.testing.assert_close(
        logits(reloaded(federation, tmp_path), batch), logits(model.module, batch), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_merged_model_has_the_same_outputs(tiny, tmp_path: Path, architecture, adapter: str, corrected: bool):
    federation = Federation(tiny(*architecture, *ADAPTERS[adapter], "adapter.alpha=6"))
    model, batch = trained_model(federation), first_batch(federation)
    correction = corrections_of(model) if corrected else {}
    state, frozen, head = parts(model)
    export_merged(federation, tmp_path, state, frozen, correction, head)
    merged = federation.task.auto_class.from_pretrained(tmp_path).eval()
    plain = logits(model.module, batch)
    model.set_base_correction(correction)
    expected = logits(model.module, batch)
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-5)
    assert ((expected - plain).abs().max() > 1e-3) == corrected


def test_the_merged_model_comes_with_its_tokenizer(tiny, tmp_path: Path):
    from transformers import AutoTokenizer

    federation = Federation(tiny())
    state, frozen, head = parts(trained_model(federation))
    export_merged(federation, tmp_path, state, frozen, {}, head)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "a lovely film"
    assert tokenizer(text)["input_ids"] == federation.backbone.tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_methods_own_tensors_reload_to_the_same_model(tiny, tmp_path: Path, adapter: str):
    federation = Federation(tiny(*ADAPTERS[adapter]))
    model, batch = trained_model(federation), first_batch(federation)
    correction = corrections_of(model)
    state, frozen, head = parts(model)
    export_adapter(federation, tmp_path, state, frozen, correction, head)
    own = load_file(tmp_path / "fedlora_state.safetensors")
    assert set(own) == {*state, *frozen}
    fresh = federation.build_model()
    fresh.load({**own, **head})
    fresh.set_base_correction(load_file(tmp_path / "base_correction.safetensors"))
    model.set_base_correction(correction)
    assert torch.equal(logits(fresh.module, batch), logits(model.module, batch))
    assert_same(
        dict(sorted(load_file(tmp_path / "base_correction.safetensors").items())), dict(sorted(correction.items()))
    )


def test_an_export_says_which_backbone_and_task_it_belongs_to(tiny, tiny_bert: Path, tmp_path: Path):
    from peft import PeftConfig

    federation = Federation(tiny())
    state, frozen, head = parts(trained_model(federation))
    export_adapter(federation, tmp_path, state, frozen, {}, head)
    config = PeftConfig.from_pretrained(str(tmp_path))
    assert config.base_model_name_or_path == str(tiny_bert)
    assert config.task_type == "SEQ_CLS"
    assert config.inference_mode
