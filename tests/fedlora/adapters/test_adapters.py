from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from fedlora.adapters import build_adapter, registered
from fedlora.adapters.base import ADAPTER_NAME
from fedlora.errors import InputError
from fedlora.evaluation import loss_gradients
from fedlora.federation import Federation
from fedlora.lowrank import relative_distance, weighted_mean
from fedlora.model import AdaptedModel
from simulations.compose import compose_config
from tests.fedlora.helpers import (
    ADAPTERS,
    FACTORS,
    SCALES,
    TARGETS,
    assert_same,
    bare_backbone,
    first_batch,
    logits,
    of_architecture,
    random_state,
    started,
)

STEP = 0.01


class Case(NamedTuple):
    adapter: str
    scale: float
    federation: Federation
    model: AdaptedModel


def cases(*adapters: str) -> list[tuple[str, str, str]]:
    return [(architecture, adapter, scale) for architecture in TARGETS for adapter in adapters for scale in SCALES]


@pytest.fixture(scope="module", params=cases(*ADAPTERS), ids="-".join)
def case(request: pytest.FixtureRequest, tiny_overrides: list[str]) -> Case:
    """Every adapter in every architecture with both rules of scaling; a test that moves it puts it back."""
    architecture, adapter, scale = request.param
    folder = request.getfixturevalue(architecture)
    overrides = [*tiny_overrides, *of_architecture(architecture, folder), *SCALES[scale], *ADAPTERS[adapter]]
    if adapter.startswith("fed_sb"):
        overrides.append(f"adapter.basis_step={STEP}")
    federation = Federation(compose_config(overrides))
    return Case(adapter, FACTORS[scale], federation, started(federation))


def affine_state(model: AdaptedModel, seed: int) -> dict[str, torch.Tensor]:
    return random_state(model, [key for key in model.shared if key not in model.head], seed)


def test_delta_is_the_measured_change_of_every_layer(case: Case):
    start = case.model.read(case.model.trainable)
    state = affine_state(case.model, 1)
    case.model.load(state)
    deltas = case.model.delta(state)
    assert list(deltas) == list(case.model.layers)
    for name, layer in case.model.layers.items():
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            change = layer(x) - layer.get_base_layer()(x)
        expected = x @ deltas[name].dense().T
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)
    case.model.load(start)


def test_delta_is_what_peft_merges(case: Case):
    start = case.model.read(case.model.trainable)
    state = affine_state(case.model, 1)
    case.model.load(state)
    for name, delta in case.model.delta(state).items():
        layer = case.model.layers[name]
        merged = layer.get_delta_weight(ADAPTER_NAME).detach()
        assert merged.shape == layer.get_base_layer().weight.shape
        oriented = merged.T if isinstance(layer.get_base_layer(), Conv1D) else merged
        torch.testing.assert_close(delta.dense(), oriented, rtol=1e-5, atol=1e-6)
    case.model.load(start)


def test_the_scale_is_inside_the_delta(case: Case):
    state = affine_state(case.model, 3)
    full = {**case.model.read(case.model.frozen), **state}
    assert case.federation.adapter.scale == pytest.approx(case.scale)
    for name, delta in case.model.delta(state).items():
        product = [full[f"{name}.{factor}.weight"] for factor in case.federation.adapter.factors]
        unscaled = torch.linalg.multi_dot(product)
        torch.testing.assert_close(delta.dense(), case.scale * unscaled, rtol=1e-4, atol=1e-6)


def test_a_model_starts_as_the_backbone_except_with_the_gradient_basis(case: Case):
    batch, backbone = first_batch(case.federation), bare_backbone(case.federation)
    same = torch.equal(logits(case.model.module, batch), logits(backbone, batch))
    assert same == (case.adapter != "fed_sb[gradient]")


@pytest.mark.parametrize(
    "case", cases("fed_sb[weight]", "fed_sb[seeded]", "fed_sb[gradient]"), indirect=True, ids="-".join
)
def test_fed_sb_with_r_zero_is_the_backbone(case: Case):
    start = case.model.read(case.model.trainable)
    case.model.load({key: torch.zeros_like(value) for key, value in start.items() if key not in case.model.head})
    batch, backbone = first_batch(case.federation), bare_backbone(case.federation)
    assert torch.equal(logits(case.model.module, batch), logits(backbone, batch))
    case.model.load(start)


@pytest.mark.parametrize("case", cases("fed_sb[gradient]"), indirect=True, ids="-".join)
def test_the_gradient_basis_starts_at_the_best_low_rank_first_step(case: Case):
    federation, model = case.federation, case.model
    start = model.read((*model.trainable, *model.frozen))
    zero = {key: torch.zeros_like(value) for key, value in start.items() if key not in model.head}
    model.load(zero)
    gradients = loss_gradients(model, federation.task, federation.rows, federation.index.public, 3)
    model.load(start)
    for name, delta in model.delta(model.read(model.shared)).items():
        first_step = -STEP * torch.sign(gradients[name].double())
        u, s, vh = torch.linalg.svd(first_step, full_matrices=False)
        best = (u[:, :4] * s[:4]) @ vh[:4]
        torch.testing.assert_close(delta.dense().double(), best, rtol=1e-4, atol=1e-4 * STEP)
        b, a = start[f"{name}.lora_B.weight"], start[f"{name}.lora_A.weight"]
        torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(a @ a.T, torch.eye(4), rtol=0, atol=1e-5)


def test_delta_of_the_mean_is_the_mean_of_deltas_exactly_for_affine_adapters(case: Case):
    states = [affine_state(case.model, seed) for seed in (4, 5, 6)]
    shares = [0.5, 0.3, 0.2]
    mean = {key: sum(p * state[key] for p, state in zip(shares, states, strict=True)) for key in states[0]}
    expected = weighted_mean([case.model.delta(state) for state in states], shares)
    error = relative_distance(expected, case.model.delta(mean))
    assert case.federation.adapter.affine == (case.adapter != "lora")
    assert error <= 1e-6 if case.federation.adapter.affine else error > 0.1


@pytest.mark.parametrize("head", ["shared", "private", "frozen"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_only_what_an_adapter_declares_is_shared_private_or_frozen(tiny, adapter: str, head: str):
    model = Federation(tiny(*ADAPTERS[adapter], f"adapter.head={head}")).build_meta_model()
    trained = {"lora": {"lora_A", "lora_B"}, "ffa": {"lora_B"}}.get(adapter, {"lora_R"})
    factors = {"lora_A", "lora_B"} | trained
    head_keys = ("classifier.weight", "classifier.bias")

    def keys(names: set[str]) -> set[str]:
        return {f"{layer}.{name}.weight" for layer in model.layers for name in names}

    assert len(model.layers) == 4
    assert model.head == head_keys
    assert set(model.shared) == keys(trained) | (set(head_keys) if head == "shared" else set())
    assert model.private == (head_keys if head == "private" else ())
    assert set(model.frozen) == keys(factors - trained)
    assert model.trainable == model.shared + model.private


@pytest.mark.parametrize("adapter", ["lora", "ffa"])
def test_the_start_of_a_depends_on_the_seed_and_the_layer_only(tiny, adapter: str):
    def start(*overrides: str) -> dict[str, torch.Tensor]:
        model = Federation(tiny(*ADAPTERS[adapter], "adapter.target_modules=[query,key]", *overrides)).build_model()
        return {name: layer.lora_A[ADAPTER_NAME].weight.detach() for name, layer in model.layers.items()}

    first = start("seed=1")
    torch.randn(3)  # whoever drew before must not matter
    assert_same(start("seed=1"), first)
    others = start("seed=2")
    assert not any(torch.equal(first[name], others[name]) for name in first)
    values = list(first.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])
    fewer = Federation(tiny(*ADAPTERS[adapter], "adapter.target_modules=[key]")).build_model()
    for name, layer in fewer.layers.items():
        assert torch.equal(layer.lora_A[ADAPTER_NAME].weight, first[name])


def test_the_start_of_a_is_that_of_peft(tiny):
    model = Federation(tiny("adapter.rank=16", "adapter.target_modules=[intermediate.dense]")).build_model()
    values = torch.cat([layer.lora_A[ADAPTER_NAME].weight.detach().flatten() for layer in model.layers.values()])
    bound = 1 / math.sqrt(32)  # Kaiming with a = sqrt 5 is uniform in +-1/sqrt(n)
    assert 0.95 * bound < values.abs().max() <= bound
    assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_building_a_model_consumes_no_global_randomness(tiny, adapter: str):
    federation = Federation(tiny(*ADAPTERS[adapter]))
    before = torch.random.get_rng_state()
    started(federation)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("adapter", ["fed_sb[weight]", "fed_sb[seeded]", "fed_sb[gradient]"])
def test_two_builds_agree_on_the_basis(tiny, adapter: str):
    first, second = (started(Federation(tiny(*ADAPTERS[adapter]))) for _ in range(2))
    assert_same(second.read(second.frozen), first.read(first.frozen))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_only_the_gradient_basis_is_sent_and_needs_a_public_sample(tiny, adapter: str):
    chosen = Federation(tiny(*ADAPTERS[adapter])).adapter
    assert chosen.broadcast_frozen == chosen.needs_public_sample == (adapter == "fed_sb[gradient]")
    assert chosen.label == adapter


def test_a_gradient_basis_without_public_rows_is_refused(tiny):
    with pytest.raises(InputError, match=r"data\.split\.public_rows"):
        Federation(tiny("method=fed_sb", "data.split.public_rows=0"))


def test_a_client_waits_for_the_gradient_basis(tiny):
    model = Federation(tiny("method=fed_sb")).build_model()
    assert not any(value.any() for value in model.read(model.frozen).values())


def test_an_unknown_adapter_names_the_nearest_one(tiny):
    with pytest.raises(InputError, match="Did you mean 'lora'"):
        build_adapter({**tiny().adapter, "name": "lara"})
    assert list(registered()) == sorted(registered())
    assert {"lora", "ffa", "fed_sb"} <= set(registered())


@pytest.mark.parametrize("name", ["lora", "ffa"])
def test_a_setting_of_another_adapter_is_refused(tiny, name: str):
    values = tiny(f"adapter={name}").adapter
    assert build_adapter(values).config.name == name
    with pytest.raises(InputError, match=r"adapter\.basis"):
        build_adapter({**values, "basis": "seeded"})


@pytest.mark.parametrize("setting", ["rank", "alpha", "basis_step"])
def test_a_size_that_is_not_positive_is_refused(tiny, setting: str):
    with pytest.raises(InputError, match=rf"adapter\.{setting}"):
        build_adapter({**tiny("method=fed_sb").adapter, setting: 0})
