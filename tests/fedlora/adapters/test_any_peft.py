"""Every PEFT method that has layers, under the promises that our own adapters keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.adapters import State
from fedlora.adapters.injection import named_tensors
from fedlora.adapters.probe import directions
from fedlora.errors import InputError
from fedlora.evaluation import row_statistics
from fedlora.federation import Federation
from fedlora.lowrank import relative_distance, weighted_mean
from fedlora.model import AdaptedModel
from strategies import Average
from tests.fedlora.adapters.peft_cases import PEFT_CASES
from tests.fedlora.helpers import assert_same, bare_backbone, first_batch, logits

# SHiRA's layers use sparse tensors, of which torch says once that it does not check them.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
SHARES = [0.5, 0.3, 0.2]
CASES = pytest.mark.parametrize("case", PEFT_CASES)


def federation_of(tiny, case: str, *more: str) -> Federation:
    return Federation(tiny("strategy=fedit", *PEFT_CASES[case].settings, *more))


def around_the_start(model: AdaptedModel, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    start = model.read(key for key in model.shared if key not in model.head)
    return {key: value + 0.1 * torch.randn(value.shape, generator=generator) for key, value in start.items()}


@CASES
def test_affinity_is_measured_as_the_formula_says(tiny, case: str) -> None:
    affinity = federation_of(tiny, case).build_meta_model().affinity
    assert affinity.reason is None
    assert affinity.error is not None
    assert affinity.affine == PEFT_CASES[case].affine
    assert affinity.error < 3e-6 if affinity.affine else affinity.error > 0.05


@CASES
def test_the_average_of_states_is_exact_for_affine_methods_only(tiny, case: str) -> None:
    model = federation_of(tiny, case).build_model()
    start = model.read(model.trainable)
    states = [around_the_start(model, seed) for seed in (1, 2, 3)]
    mean = {key: sum(p * state[key] for p, state in zip(SHARES, states, strict=True)) for key in states[0]}
    expected = weighted_mean([model.delta(state) for state in states], SHARES)
    error = relative_distance(expected, model.delta(mean))
    assert error <= 1e-6 if PEFT_CASES[case].affine else error > 1e-3
    assert_same(model.read(model.trainable), start)
    assert list(expected) == list(model.layers)


@CASES
def test_two_builds_agree_on_every_tensor_whatever_was_drawn_before(tiny, case: str) -> None:
    first = federation_of(tiny, case).build_model()
    torch.rand(5)
    before = torch.random.get_rng_state()
    second = federation_of(tiny, case).build_model()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same(named_tensors(second.module), named_tensors(first.module))


@CASES
def test_what_travels_is_what_peft_trains_and_the_meta_model_knows_it(tiny, case: str) -> None:
    federation = federation_of(tiny, case)
    real, meta = federation.build_model(), federation.build_meta_model()
    trained = {id(p) for p in real.parameters()}
    assert trained == {id(p) for p in real.module.parameters() if p.requires_grad}
    for keys in ("shared", "private", "frozen", "head"):
        assert getattr(meta, keys) == getattr(real, keys)
    everything = (*real.trainable, *real.frozen)
    assert meta.shapes(everything) == real.shapes(everything)
    assert not any("default" in key for key in everything)
    assert not set(real.frozen) & set(real.trainable)


@CASES
def test_every_trained_tensor_gets_a_gradient_and_the_backbone_none(tiny, case: str) -> None:
    federation = federation_of(tiny, case)
    model = federation.build_model()
    model.load(around_the_start(model, 0))
    federation.task.loss(model.module, first_batch(federation)).backward()
    missing = [key for key, p in zip(model.trainable, model.parameters(), strict=True) if p.grad is None]
    assert not missing or case == "GLoRA"  # some paths of GLoRA are chosen at random at the start
    model.assert_trainables()


def test_the_measured_update_is_that_of_the_formula(tiny) -> None:
    federation = federation_of(tiny, "LoRA", "adapter.config.lora_alpha=6")
    model = federation.build_model()
    state = around_the_start(model, 4)
    for name, measured in model.delta(state).items():
        dense = 6 / 4 * state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        expected = dense.double() @ directions(name, dense.shape[1]).T
        torch.testing.assert_close(measured.dense(), expected, rtol=1e-5, atol=1e-6)


def test_a_method_that_is_not_affine_is_refused_by_average_with_the_measured_number(tiny) -> None:
    model = federation_of(tiny, "VeRA").build_meta_model()
    with pytest.raises(InputError, match=r"peft\[Vera\] is not one \(measured: .* off by 0\.[0-9]+ .*strategy=fedit"):
        Average().prepare(model)
    Average().prepare(federation_of(tiny, "Miss").build_meta_model())


def test_the_answer_is_kept_on_disk(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    from fedlora.adapters import affinity

    affinity._recalled.cache_clear()
    first = federation_of(tiny, "HRA").build_meta_model().affinity
    (file,) = (tmp_path / "affine").glob("*.json")
    file.write_text('{"affine": false, "error": 0.125, "reason": null}')
    assert federation_of(tiny, "HRA").build_meta_model().affinity == first
    affinity._recalled.cache_clear()
    assert federation_of(tiny, "HRA").build_meta_model().affinity.error == 0.125
    affinity._recalled.cache_clear()


def test_a_random_start_comes_from_the_seed(tiny) -> None:
    first, other = (federation_of(tiny, "FourierFT", f"seed={seed}").build_model() for seed in (1, 2))
    for key in first.shared:
        if key not in first.head:
            assert not torch.equal(first.read([key])[key], other.read([key])[key])


def test_the_name_says_which_variant_it_is(tiny) -> None:
    assert federation_of(tiny, "Miss").adapter.label == "peft[Miss]"
    assert federation_of(tiny, "Miss bat").adapter.label == "peft[Miss,init_weights=bat]"
    assert Federation(tiny("adapter=dora")).adapter.label == "peft[Lora,use_dora]"


def test_dropout_of_a_peft_layer_does_not_reach_the_measurement(tiny) -> None:
    model = federation_of(tiny, "DoRA", "adapter.config.lora_dropout=0.5").build_model()
    state = around_the_start(model, 1)
    model.module.train()
    assert relative_distance(model.delta(state), model.delta(state)) == 0.0
    assert model.module.training


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.config._target_=peft.PromptTuningConfig"], "learns a prompt and adapts no layers"),
        (["adapter.config._target_=peft.PolyConfig"], "number of a task with every row"),
        (["adapter.config._target_=peft.XLoraConfig"], "mixes adapters"),
        (["adapter.config._target_=peft.LoraModel"], "is no PEFT configuration"),
        (["adapter.config._target_=peft.Missing"], "there is no 'Missing'"),
        (["adapter.config._target_=peft.MissConfig", "adapter.config.rr=2"], "adapter.config.rr.*Did you mean 'r'"),
        (["adapter.config._target_=peft.LoraConfig", "adapter.config.adapter_name=x"], "adapter_name"),
        (["adapter.config._target_=peft.LoraConfig", "adapter.config.modules_to_save=[x]"], r"adapter\.head"),
        (["adapter.config._target_=peft.LoraConfig", "adapter.config.bias=all"], "biases"),
        (["adapter.config._target_=peft.AdaLoraConfig", "adapter.config.total_step=-1"], "AdaLoraConfig refuses"),
        (["adapter.config._target_=peft.LoraConfig", "adapter.frozen=sown"], r"adapter\.frozen"),
        (
            [
                "adapter.config._target_=peft.LoraConfig",
                "adapter.config.target_modules=[query]",
                "adapter.target_modules=[key]",
            ],
            "both set",
        ),
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_refused(tiny, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Federation(tiny("adapter=peft", *overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["adapter.config._target_=peft.LoraConfig", "adapter.config.init_lora_weights=pissa"],
            "backbone's own weights",
        ),
        (
            ["adapter.config._target_=peft.LoraConfig", "adapter.config.init_lora_weights=olora"],
            "backbone's own weights",
        ),
        (
            ["adapter.config._target_=peft.LoraConfig", "adapter.target_modules=[word_embeddings]"],
            "Embedding; choose linear",
        ),
        (["adapter.config._target_=peft.LoraConfig", "adapter.target_modules=[qery]"], "matches no layer.*query"),
        (["adapter.config._target_=peft.RoadConfig"], "PEFT refuses this adapter: .*divisible"),
        (["adapter.config._target_=peft.LoraConfig", "adapter.frozen=broadcast"], "has no frozen tensors"),
    ],
    ids=str,
)
@pytest.mark.parametrize("build", ["build_model", "build_meta_model"])
def test_an_adapter_that_cannot_serve_the_backbone_is_refused_before_the_run_and_by_the_plan(
    tiny, overrides: list[str], message: str, build: str
) -> None:
    federation = Federation(tiny("adapter=peft", *overrides))
    with pytest.raises(InputError, match=message):
        getattr(federation, build)()


def test_conv1d_layers_of_gpt2_are_adapted(tiny_lm, tiny_gpt2: Path) -> None:
    federation = Federation(
        tiny_lm("strategy=average", f"backbone.path={tiny_gpt2}", *PEFT_CASES["IA3"].settings,
                "adapter.target_modules=[c_attn]")
    )  # fmt: skip
    model = federation.build_model()
    assert model.affinity.affine
    state = around_the_start(model, 1)
    assert all(delta.shape[0] == 96 for delta in model.delta(state).values())


def test_the_model_starts_as_the_backbone_where_peft_says_so(tiny) -> None:
    federation = federation_of(tiny, "Miss")
    batch = first_batch(federation)
    rows = federation.index.train[federation.clients[0]]
    model = federation.build_model()
    assert torch.equal(logits(model.module, batch), logits(bare_backbone(federation), batch))
    assert row_statistics(model, federation.task, federation.rows, rows, 4)
