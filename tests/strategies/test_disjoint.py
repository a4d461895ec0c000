"""Clients in disjoint subspaces: a sum keeps every client's part apart, and isolation says what a client sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fedlora.adapters import State
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.lowrank import LowRank, relative_distance
from fedlora.model import AdaptedModel
from simulations.compose import compose_config
from simulations.plan import plan_run
from simulations.simulate import resume, start
from strategies import Disjoint
from strategies.base import Reply
from strategies.means import weights
from tests.conftest import Compose
from tests.simulations.test_cohort import assert_engines_agree
from tests.simulations.test_resume import KillAt, Killed, assert_same_run
from tests.simulations.test_rounds import rounds_of

METHOD = ["method=disjoint", "client.lr=1e-2"]
ISOLATIONS = ["open", "strict"]
promise = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def model(tiny_overrides: list[str]) -> AdaptedModel:
    more = ["adapter.rank=2", "adapter.alpha=3", "adapter.target_modules=[query,intermediate.dense,output.dense]"]
    return Federation(compose_config([*tiny_overrides, "method=disjoint", *more])).build_model()


def replies_of(model: AdaptedModel, clients: Sequence[str], seed: int) -> list[Reply]:
    generator = torch.Generator().manual_seed(seed)
    counts, shapes = [3 + 7 * i for i in range(len(clients))], model.shapes(model.shared)
    return [
        Reply(client, {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}, n, share, 0.5)
        for client, n, share in zip(clients, counts, weights(counts, "examples"), strict=True)
    ]


def update_of(model: AdaptedModel, client: str, state: Mapping[str, torch.Tensor]) -> dict[str, LowRank]:
    """s B_k A_k, from the definition."""
    return model.delta({**state, **model.own_of(client)})


def run_rounds(model: AdaptedModel, isolation: str, cohorts: Sequence[Sequence[str]]) -> tuple[Disjoint, list[State]]:
    """A strategy after random rounds, and what every client's block must be then."""
    strategy = Disjoint(isolation=isolation)  # type: ignore[arg-type]
    strategy.prepare(model)
    state, expected = model.read(model.shared), {}
    for number, cohort in enumerate(cohorts, 1):
        replies = replies_of(model, cohort, number)
        for reply in replies:
            strategy.send(reply.client, number, state)
            factors = {key: value for key, value in reply.state.items() if key not in model.head}
            held = expected.get(reply.client)
            fresh = held is None or isolation == "strict"
            expected[reply.client] = factors if fresh else {key: held[key] + factors[key] for key in factors}
        state = strategy.fold(number, state, replies)
    return strategy, expected  # type: ignore[return-value]


@promise
@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True), min_size=1, max_size=4), st.data())
def test_the_sum_keeps_every_clients_block_apart(model: AdaptedModel, chosen: list[list[int]], data: st.DataObject):
    clients = model.adapter.clients
    isolation = data.draw(st.sampled_from(ISOLATIONS))
    strategy, blocks = run_rounds(model, isolation, [[clients[i] for i in cohort] for cohort in chosen])
    updates = {client: update_of(model, client, block) for client, block in blocks.items()}  # type: ignore
    total = strategy.base_correction()
    for module in model.layers:
        parts = {client: update[module].dense() for client, update in updates.items()}
        size = total[module].norm()
        assert (total[module] - sum(parts.values())).norm() <= 1e-6 * size
        assert size**2 == pytest.approx(sum(float(part.norm()) ** 2 for part in parts.values()), rel=1e-5)
        for client, part in parts.items():
            rows = model.own_of(client)[f"{module}.lora_A.weight"]
            assert (total[module] @ rows.T @ rows - part).norm() <= 1e-5 * size


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_round_adds_exactly_what_its_clients_trained(model: AdaptedModel, isolation: str) -> None:
    clients = model.adapter.clients[:3]
    strategy, _ = run_rounds(model, isolation, [clients, clients])
    expected = [update_of(model, reply.client, reply.state) for reply in replies_of(model, clients, 2)]
    summed = {name: LowRank.sum([update[name] for update in expected]) for name in expected[0]}
    assert relative_distance(summed, strategy.residual()) <= 1e-6


@pytest.fixture(scope="module")
def grouped(tiny_overrides: list[str]) -> AdaptedModel:
    more = ["adapter.rank=3", "adapter.alpha=2", "adapter.groups=3", "adapter.target_modules=[query,output.dense]"]
    return Federation(compose_config([*tiny_overrides, "method=disjoint", *more])).build_model()


@promise
@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=6, unique=True), min_size=1, max_size=3), st.data())
def test_inside_a_group_is_the_mean_and_across_groups_the_sum(
    grouped: AdaptedModel, chosen: list[list[int]], data: st.DataObject
):
    clients, isolation = grouped.adapter.clients, data.draw(st.sampled_from(ISOLATIONS))
    strategy, blocks = Disjoint(isolation=isolation), {}  # type: ignore[arg-type]
    strategy.prepare(grouped)
    state = grouped.read(grouped.shared)
    for number, cohort in enumerate(chosen, 1):
        replies = replies_of(grouped, [clients[i] for i in cohort], number)
        updates = [update_of(grouped, reply.client, reply.state) for reply in replies]
        for group in {i % 3 for i in cohort}:
            own = [
                (update, r.examples) for i, update, r in zip(cohort, updates, replies, strict=True) if i % 3 == group
            ]
            rows = sum(examples for _, examples in own)
            for module in grouped.layers:
                mean = sum(update[module].double().dense() * examples / rows for update, examples in own)
                held = 0 if isolation == "strict" else blocks.get((group, module), 0)
                blocks[group, module] = held + mean
        for reply in replies:
            strategy.send(reply.client, number, state)
        state = strategy.fold(number, state, replies)
    for module, total in strategy.base_correction().items():
        expected = sum(block for (_, name), block in blocks.items() if name == module)
        assert (total - expected).norm() <= 1e-6 * total.norm()


def test_a_client_of_a_group_gets_the_block_of_its_group(grouped: AdaptedModel) -> None:
    clients, state = grouped.adapter.clients, grouped.read(grouped.shared)
    strategy, _ = run_rounds(grouped, "strict", [clients[:2]])
    (trained, other), name = (replies_of(grouped, clients[:2], 1)[i].state for i in (0, 1)), next(iter(grouped.layers))
    key = f"{name}.lora_B.weight"
    assert torch.equal(strategy.send(clients[3], 2, state).state[key], trained[key])
    assert torch.equal(strategy.send(clients[4], 2, state).state[key], other[key])
    assert not strategy.send(clients[5], 2, state).state[key].any()


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_run_of_groups_is_measured_exact(tiny: Compose, tmp_path: Path, isolation: str) -> None:
    config = tiny(*METHOD, f"strategy.isolation={isolation}", "adapter.groups=2", "adapter.rank=8", "cohort.size=null")
    summary = start(config, tmp_path / "run")
    assert 0 < summary["aggregation_error"]["max"] <= 1e-6
    assert summary["label"] == "disjoint[groups=2]"
    blocks = load_file(tmp_path / "run" / "adapter" / "blocks.safetensors")
    assert {name.rpartition("/")[0] for name in blocks} == {"group-0000", "group-0001"}


def test_modules_that_differ_inside_a_group_are_refused_where_its_block_is_replaced(tiny: Compose) -> None:
    more = ["adapter.groups=2", "adapter.client_modules=[all,query]"]
    model = Federation(tiny(*METHOD, *more)).build_meta_model()
    Disjoint().prepare(model)
    with pytest.raises(InputError, match=r"client_modules.*adapter\.groups=null.*strategy\.isolation=open"):
        Disjoint(isolation="strict").prepare(model)


def test_a_client_gets_all_other_blocks_or_its_own_alone(model: AdaptedModel) -> None:
    clients, state = model.adapter.clients[:3], model.read(model.shared)
    seeing, blocks = run_rounds(model, "open", [clients])
    out = seeing.send(clients[0], 2, state)
    assert out.instructions == {"restart": True}
    assert set(out.state) == set(model.head)
    assert out.correction is not None
    apart, blocks = run_rounds(model, "strict", [clients])
    out = apart.send(clients[0], 2, state)
    assert out.correction is None
    assert not out.instructions
    assert all(torch.equal(out.state[key], value) for key, value in blocks[clients[0]].items())  # type: ignore
    newcomer = apart.send(model.adapter.clients[5], 2, state)
    assert not any(value.any() for key, value in newcomer.state.items() if key not in model.head)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_a_run_is_measured_exact_and_its_base_is_the_sum_of_its_blocks(
    tiny: Compose, tmp_path: Path, isolation: str
) -> None:
    config = tiny(*METHOD, f"strategy.isolation={isolation}", "rounds=4")
    summary = start(config, tmp_path / "run")
    assert 0 < summary["aggregation_error"]["max"] <= 1e-6
    assert summary["label"] == "disjoint"
    model = Federation(config).build_model()
    strategy = Disjoint()
    strategy.prepare(model)
    strategy.keep_blocks(load_file(tmp_path / "run" / "adapter" / "blocks.safetensors"))
    assert set(strategy.blocks) == {c for record in rounds_of(tmp_path / "run") for c in record["cohort"]}
    for module, dense in load_file(tmp_path / "run" / "adapter" / "base_correction.safetensors").items():
        assert dense.norm() > 0
        assert (dense - strategy.total()[module]).norm() <= 1e-6 * dense.norm()


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("more", [["adapter.head=frozen"], ["adapter.head=private", "wire.dtype=bf16"]], ids=str)
def test_plan_equals_ledger(tiny: Compose, tmp_path: Path, isolation: str, more: list[str]) -> None:
    config = tiny(*METHOD, f"strategy.isolation={isolation}", "cohort.size=3", "rounds=5", "eval.every=5", *more)
    planned = plan_run(config)
    start(config, tmp_path / "run")
    for expected, record in zip(planned["per_round"], rounds_of(tmp_path / "run")[1:], strict=True):
        for key in ("payload_up", "payload_down", "setup_bytes"):
            assert record[key] == expected[key], (record["round"], key)
        for key in ("message_up", "message_down", "transport_up", "transport_down"):
            assert record[key] == pytest.approx(expected[key], rel=1e-3), (record["round"], key)
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    assert ledger["setup"].sum() == 0


def test_cohort_equals_loop_where_each_client_has_its_own_block(tiny: Compose, tmp_path: Path) -> None:
    strict = ["strategy.isolation=strict", "client.keep_optimizer=true", "cohort.size=null"]
    assert_engines_agree(tiny, tmp_path, *METHOD, *strict)


@pytest.mark.parametrize("isolation", ISOLATIONS)
def test_cohort_equals_loop_where_clients_share_the_block_of_a_group(
    tiny: Compose, tmp_path: Path, isolation: str
) -> None:
    groups = ["adapter.groups=3", "adapter.rank=4", f"strategy.isolation={isolation}", "cohort.size=null"]
    assert_engines_agree(tiny, tmp_path, *METHOD, *groups)


@pytest.mark.parametrize("isolation", ISOLATIONS)
@pytest.mark.parametrize("kill", [{"client": 7}, {"round_end": 2}], ids=str)
def test_a_killed_run_resumes_to_the_same_bits(
    tiny: Compose, tmp_path: Path, isolation: str, kill: dict[str, int]
) -> None:
    config = tiny(*METHOD, f"strategy.isolation={isolation}", "engine=cohort", "engine.tokens=200")
    start(config, tmp_path / "whole")
    with pytest.raises(Killed):
        start(config, tmp_path / "killed", callbacks=[KillAt(**kill)])  # type: ignore[arg-type]
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("adapter", [["adapter=ffa"], ["adapter=orthogonal", "adapter.subspace=shared"]], ids=str)
def test_one_subspace_for_all_is_refused(tiny: Compose, adapter: list[str]) -> None:
    federation = Federation(tiny("strategy=disjoint", *adapter))
    with pytest.raises(InputError, match=r"adapter=orthogonal adapter\.subspace=disjoint"):
        Disjoint().prepare(federation.build_meta_model())


def test_an_isolation_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match=r"strategy\.isolation = 'half' is not valid"):
        Disjoint(isolation="half")  # type: ignore[arg-type]


def test_moments_of_fresh_factors_are_refused_only_where_factors_are_fresh(tiny: Compose, tmp_path: Path) -> None:
    kept = [*METHOD, "client.keep_optimizer=true", "rounds=1"]
    with pytest.raises(InputError, match="keep_optimizer=true has no effect with Disjoint"):
        start(tiny(*kept), tmp_path / "open")
    start(tiny(*kept, "strategy.isolation=strict"), tmp_path / "strict")
