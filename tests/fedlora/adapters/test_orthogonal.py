"""Orthogonal LoRA: its rows are what each plan says, cost no bytes, and what cannot work is refused at the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedlora.adapters.bases import complementary_rows, orthonormal_rows
from fedlora.adapters.fed_sb import oriented_weight
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.model import AdaptedModel
from simulations.simulate import start
from strategies.build import build_strategy
from tests.conftest import Compose
from tests.fedlora.helpers import TARGETS, assert_same, of_architecture

promise = settings(deadline=None, max_examples=30)
ROUNDING = 1e-6
DISJOINT = ["method=orthogonal", "adapter.subspace=disjoint"]


def rows_of(model: AdaptedModel) -> dict[str, Tensor]:
    return {name: model.read(model.frozen)[f"{name}.lora_A.weight"] for name in model.layers}


def assert_orthonormal(rows: Tensor) -> None:
    assert rows.dtype == torch.float32
    assert (rows @ rows.T - torch.eye(len(rows))).norm() <= ROUNDING


@promise
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 12), st.integers(0, 1000))
def test_slices_are_orthonormal_and_the_first_do_not_depend_on_how_many_follow(rank, slices, spare, seed):
    n = rank * slices + spare
    rows = orthonormal_rows(n, [rank] * slices, seed, "layer")
    assert_orthonormal(rows)
    for one in range(slices):
        for other in range(one):
            blocks = (rows[k * rank : (k + 1) * rank] for k in (one, other))
            first, second = blocks
            assert (first @ second.T).norm() <= ROUNDING
    torch.testing.assert_close(orthonormal_rows(n, [rank], seed, "layer"), rows[:rank], rtol=0, atol=ROUNDING)


@promise
@given(st.integers(1, 12), st.integers(2, 12), st.data(), st.integers(0, 1000))
def test_complementary_rows_avoid_what_the_weight_uses_most(m, n, data, seed):
    avoid = data.draw(st.integers(1, min(m, n - 1)))
    rank = data.draw(st.integers(1, n - avoid))
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    rows = complementary_rows(weight, rank, avoid, seed, "layer")
    assert_orthonormal(rows)
    leading = torch.linalg.svd(weight, full_matrices=False).Vh[:avoid]
    assert (rows @ leading.T).norm() <= 1e-4  # the SVD here is in fp32


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("subspace", ["shared", "complementary"])
def test_all_clients_have_the_same_rows_another_seed_and_layer_other_ones(
    tiny: Compose, request: pytest.FixtureRequest, architecture: str, subspace: str
) -> None:
    overrides = of_architecture(architecture, request.getfixturevalue(architecture))
    plan = ["method=orthogonal", f"adapter.subspace={subspace}", "adapter.avoid=5", *overrides]
    model, again, other = (Federation(tiny(*plan, f"seed={seed}")).build_model() for seed in (1, 1, 2))
    assert model.own == ()
    assert_same(rows_of(model), rows_of(again))
    found = rows_of(model)
    for name, rows in found.items():
        assert_orthonormal(rows)
        assert (rows - rows_of(other)[name]).norm() > 0.1
        weight = oriented_weight(model.layers[name])  # type: ignore[arg-type]
        used = torch.linalg.svd(weight.double(), full_matrices=False).Vh[:5].float()
        assert ((rows @ used.T).norm() <= 1e-5) == (subspace == "complementary")
    same_size = [rows for rows in found.values() if rows.shape[1] == 32]
    assert (same_size[0] - same_size[1]).norm() > 0.1


@pytest.mark.parametrize("architecture", TARGETS)
def test_each_client_has_its_own_rows_and_the_first_has_the_shared_ones(
    tiny: Compose, request: pytest.FixtureRequest, architecture: str
) -> None:
    overrides = [*of_architecture(architecture, request.getfixturevalue(architecture)), "adapter.rank=2"]
    federation = Federation(tiny(*DISJOINT, *overrides))
    model = federation.build_model()
    shared = rows_of(Federation(tiny("method=orthogonal", *overrides)).build_model())
    assert model.frozen == ()
    assert set(model.own) == {f"{name}.lora_A.weight" for name in model.layers}
    owned = [model.own_of(client) for client in federation.clients]
    for name in model.layers:
        stack = [each[f"{name}.lora_A.weight"] for each in owned]
        assert_orthonormal(torch.cat(stack))
        torch.testing.assert_close(stack[0], shared[name], rtol=0, atol=ROUNDING)
    assert_same(owned[3], Federation(tiny(*DISJOINT, *overrides)).build_model().own_of(federation.clients[3]))


def test_without_weights_rows_that_depend_on_them_are_zero_and_shapes_are_known(tiny: Compose) -> None:
    meta = Federation(tiny("method=orthogonal", "adapter.subspace=complementary")).build_meta_model()
    meta.initialise(1)
    assert all(value.is_meta for value in meta.read(meta.frozen).values())
    federation = Federation(tiny(*DISJOINT, "adapter.rank=2"))
    meta = federation.build_meta_model()
    own = meta.own_of(federation.clients[1])
    assert {key: tuple(value.shape) for key, value in own.items()} == meta.shapes(meta.own)
    assert all(value.is_meta for value in own.values())


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_complementary_rows_see_the_decoded_weights(tiny: Compose, quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    plan = ["method=orthogonal", "adapter.subspace=complementary", f"backbone.quantization={quantization}"]
    model = Federation(tiny(*plan)).build_model()
    for name, rows in rows_of(model).items():
        weight = oriented_weight(model.layers[name])  # type: ignore[arg-type]
        used = torch.linalg.svd(weight.double(), full_matrices=False).Vh[:16].float()
        assert (rows @ used.T).norm() <= 1e-5


def test_more_clients_than_rows_allow_are_refused_at_the_start(tiny: Compose) -> None:
    federation = Federation(tiny(*DISJOINT, "adapter.rank=4"))
    count = len(federation.clients)
    assert count * 4 > 32
    with pytest.raises(InputError, match=rf"{count} training clients.*query.* 32 input.* 8 clients.*rank <= 3"):
        federation.build_meta_model()
    Federation(tiny(*DISJOINT, "adapter.rank=3")).build_meta_model()


BY_PARITY = "data.group={{ 'even' if site[-1] in '02468' else 'odd' }}"


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (["adapter.groups=4"], lambda place, client: place % 4),
        (["adapter.groups=natural", BY_PARITY], lambda place, client: int(client[-1]) % 2),
    ],
    ids=["in turn", "natural"],
)
def test_clients_of_a_group_have_the_same_rows_and_groups_have_orthogonal_ones(tiny: Compose, plan, expected) -> None:
    federation = Federation(tiny(*DISJOINT, "adapter.rank=4", *plan))
    model, clients = federation.build_model(), federation.clients
    groups = [expected(place, client) for place, client in enumerate(clients)]
    assert 1 < len(set(groups)) < len(clients)
    first = {group: model.own_of(client) for client, group in zip(reversed(clients), reversed(groups), strict=True)}
    for client, group in zip(clients, groups, strict=True):
        assert_same(model.own_of(client), first[group])
    for name in model.layers:
        assert_orthonormal(torch.cat([each[f"{name}.lora_A.weight"] for each in first.values()]))


def test_more_clients_fit_in_groups_and_too_many_groups_are_refused(tiny: Compose) -> None:
    Federation(tiny(*DISJOINT, "adapter.rank=4", "adapter.groups=8")).build_meta_model()
    with pytest.raises(InputError, match=r"8 groups adapter.rank = 5 rows.*32 input.*6 groups.*adapter.groups <= 6"):
        Federation(tiny(*DISJOINT, "adapter.rank=5", "adapter.groups=8")).build_meta_model()


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (["adapter.groups=10"], r"adapter.groups = 10, but there are only 9 training clients"),
        (["adapter.groups=natural"], r"adapter.groups=natural.*the data names none. Set data.group"),
        (["adapter.groups=2", "adapter.subspace=shared"], r"adapter.groups = 2 needs.*adapter.subspace=disjoint"),
        (["adapter.groups=0"], r"adapter.groups"),
        (["adapter.groups=regions"], r"adapter.groups"),
        (["data.group=label"], r"data.group: client 'site \d\d' has rows of 2 groups, among them '\w+' and '\w+'"),
    ],
)
def test_groups_that_are_not_there_are_refused(tiny: Compose, plan: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Federation(tiny(*DISJOINT, "adapter.rank=2", *plan)).build_meta_model()


def test_too_many_directions_to_avoid_are_refused(tiny: Compose) -> None:
    plan = ["method=orthogonal", "adapter.subspace=complementary"]
    with pytest.raises(InputError, match=r"adapter.avoid = 29 leaves no 4 rows.*avoid <= 28"):
        Federation(tiny(*plan, "adapter.avoid=29")).build_meta_model()
    Federation(tiny(*plan, "adapter.avoid=28")).build_meta_model()


@pytest.mark.parametrize(
    "strategy", ["average", "fedit", "fedsvd", "central", "strategy._target_=flwr.serverapp.strategy.FedAvg"]
)
def test_strategies_that_mix_subspaces_are_refused(tiny: Compose, strategy: str) -> None:
    chosen = strategy if "=" in strategy else f"strategy={strategy}"
    config = tiny(*DISJOINT, "adapter.rank=2", chosen)
    with pytest.raises(InputError, match=r"orthogonal\[disjoint\].*strategy=disjoint.*adapter.subspace=shared"):
        build_strategy(config.strategy, Federation(config).build_meta_model())


@pytest.mark.parametrize("strategy", ["local", "zero_shot"])
def test_a_client_alone_may_use_its_own_rows(tiny: Compose, tmp_path: Path, strategy: str) -> None:
    summary = start(tiny(*DISJOINT, "adapter.rank=2", f"strategy={strategy}", "rounds=1"), tmp_path / "run")
    assert summary["final"]["metrics"]
