"""The cohort engine against the loop engine: the same numbers, whatever shares a batch."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from fedlora.client import Worker
from fedlora.client_axis import grouped_linear
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.store import ClientStore
from simulations.simulate import start
from tests.conftest import Compose
from tests.simulations.test_rounds import METHODS, rounds_of

TOLERANCE = 1e-4


def states(folder: Path) -> dict[str, torch.Tensor]:
    if not (folder / "adapter").exists():  # a personalised method
        store = ClientStore(folder / "clients")
        kept = {client: store.read(client, 1000).private for client in store.clients()}
        own = {f"{client} {key}": value for client, private in kept.items() for key, value in private.items()}
        shared = folder / "shared.safetensors"
        return own | (load_file(shared) if shared.exists() else {})
    found = load_file(folder / "adapter" / "fedlora_state.safetensors")
    correction = folder / "adapter" / "base_correction.safetensors"
    return found | load_file(folder / "adapter" / "adapter_model.safetensors") | (
        load_file(correction) if correction.exists() else {}
    )  # fmt: skip


def assert_engines_agree(compose: Compose, folder: Path, *overrides: str, tokens: int = 400) -> None:
    for name, engine in (("loop", ["engine=loop"]), ("cohort", ["engine=cohort", f"engine.tokens={tokens}"])):
        start(compose(*overrides, *engine, "engine.threads=1"), folder / name)
    loop, cohort = states(folder / "loop"), states(folder / "cohort")
    assert loop.keys() == cohort.keys()
    for key, value in loop.items():
        assert value.sub(cohort[key]).abs().max() <= TOLERANCE, key
    columns = ["round", "client", "direction", "payload", "setup", "message", "transport", "status"]
    ledgers = [pd.read_parquet(folder / name / "ledger.parquet") for name in ("loop", "cohort")]
    pd.testing.assert_frame_equal(ledgers[0][columns], ledgers[1][columns])
    for one, two in zip(rounds_of(folder / "loop"), rounds_of(folder / "cohort"), strict=True):
        assert one["cohort"] == two["cohort"]
        assert one["failures"] == two["failures"]
        assert one["loss"] is None or one["loss"] == pytest.approx(two["loss"], abs=1e-4)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "zero_shot"])
def test_cohort_equals_loop_for_every_method(tiny: Compose, tmp_path: Path, method: str) -> None:
    assert_engines_agree(tiny, tmp_path, f"method={method}", "cohort.size=null")


@pytest.mark.parametrize("method", ["fedit", "fed_sb"])
def test_cohort_equals_loop_for_a_language_model(tiny_lm: Compose, tmp_path: Path, method: str) -> None:
    assert_engines_agree(tiny_lm, tmp_path, f"method={method}", "adapter.target_modules=all-linear")


@pytest.mark.parametrize("tokens", [60, 120, 400, 4000])
def test_the_size_of_a_cohort_changes_nothing(tiny: Compose, tmp_path: Path, tokens: int) -> None:
    assert_engines_agree(tiny, tmp_path, "method=ffa", "cohort.size=null", "client.local_epochs=2", tokens=tokens)


@pytest.mark.parametrize(
    "knobs",
    [
        ["client.optimizer=sgd", "client.lr=0.1"],
        ["client.weight_decay=0.1", "client.max_grad_norm=0.05"],
        ["client.grad_accumulation=3", "client.batch_size=2"],
        ["client.schedule=cosine_restarts", "client.warmup=0.3", "client.local_epochs=2"],
        ["client.keep_optimizer=true", "cohort.size=null"],
        ["client.keep_optimizer=true", "cohort.size=null", "method=rolora", "rounds=4"],
        ["method=personal_lora", "adapter.private_rank=[3,1]", "client.keep_optimizer=true", "cohort.size=null"],
        ["method=personal_lora", "adapter.alternate=false", "adapter.head=private"],
        ["method=split", "adapter.private_rank=[2,1]", "client.optimizer=sgd", "client.lr=0.1"],
        ["client.local_steps=3"],
        ["adapter.head=private"],
        ["adapter.head=frozen", "adapter.target_modules=attention"],
        ["adapter.rank=3", "adapter.alpha=5"],
    ],
    ids=" ".join,
)
def test_cohort_equals_loop_with_every_knob(tiny: Compose, tmp_path: Path, knobs: list[str]) -> None:
    assert_engines_agree(tiny, tmp_path, "method=ffa", *knobs)


def test_cohort_equals_loop_from_gradients_of_clients(tiny: Compose, tmp_path: Path) -> None:
    assert_engines_agree(tiny, tmp_path, "method=fed_sb", "adapter.basis=client_gradient", "cohort.size=6")


@pytest.mark.parametrize("basis", ["gradient", "seeded"])
def test_cohort_equals_loop_with_a_new_basis(tiny: Compose, tmp_path: Path, basis: str) -> None:
    more = [f"adapter.basis={basis}", "strategy.refresh=2", "rounds=4", "cohort.size=6"]
    assert_engines_agree(tiny, tmp_path, "method=fed_sb", *more)


def test_clients_of_different_rank_share_a_cohort(tiny: Compose, tmp_path: Path) -> None:
    assert_engines_agree(tiny, tmp_path, "method=flexlora", "adapter.client_ranks=[4,2,1]", "cohort.size=null")


def test_a_client_that_diverges_costs_only_itself(tiny: Compose, reviews: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"every client failed.*the loss is .* at local step .*Lower client\.lr"):
        start(tiny("client.lr=1e30", "client.local_epochs=3", "engine=cohort"), tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["adapter.dropout=0.1"], "dropout is drawn for each client"),
        ([], None),
    ],
)
def test_what_has_no_client_axis_says_why_and_runs_as_the_loop(
    tiny: Compose, tmp_path: Path, overrides: list[str], reason: str | None
) -> None:
    worker = Worker(Federation(tiny(*overrides)), ClientStore(tmp_path / "store"))
    found = worker.share_steps()
    assert found is None if reason is None else reason in str(found)
    if reason:
        for engine in ("loop", "cohort"):
            start(tiny(*overrides, "rounds=1", f"engine={engine}", "engine.threads=1"), tmp_path / engine)
        one, two = (rounds_of(tmp_path / engine)[-1] for engine in ("loop", "cohort"))
        assert (one["loss"], one["metrics"]) == (two["loss"], two["metrics"])
        assert reason in (tmp_path / "cohort" / "log.txt").read_text()


def test_a_grouped_product_is_each_clients_own_product() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 5, 6), torch.randn(4, 3, 6)
    rows = [2, 0, 4, 3]
    x.requires_grad_(), weight.requires_grad_()
    found = grouped_linear(x.flatten(0, 1), weight, [5 * count for count in rows]).view(9, 5, 3)
    owner = torch.repeat_interleave(torch.arange(4), torch.tensor(rows))
    expected = torch.einsum("btn,bmn->btm", x, weight[owner])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    mixed = torch.randn_like(found)
    for one, two in zip(
        torch.autograd.grad(found, (x, weight), mixed), torch.autograd.grad(expected, (x, weight), mixed), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
