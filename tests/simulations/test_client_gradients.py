"""The basis of Fed-SB from gradients that the clients of the first cohort send once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from safetensors.torch import load_file, save_file

from fedlora import wire
from fedlora.adapters.bases import gradient_basis
from fedlora.errors import FedloraError, InputError
from fedlora.evaluation import loss_gradients
from fedlora.federation import Federation
from fedlora.grid import error_reply
from simulations.client_gradients import GradientGrid, ask, summed
from simulations.simulate import start
from tests.conftest import Compose
from tests.fedlora.helpers import Engine
from tests.simulations.test_rounds import rounds_of

BASIS = ["method=fed_sb", "adapter.basis=client_gradient"]
LAYOUT = {"one": (2, 3), "two": (1, 2)}


def test_the_basis_is_that_of_the_summed_gradients_of_the_first_cohort(tiny: Compose, tmp_path: Path) -> None:
    config = tiny(*BASIS, "rounds=1", "data.split.public_rows=0")
    start(config, tmp_path / "run")
    records = rounds_of(tmp_path / "run")
    assert records[0]["cohort"] == records[1]["cohort"]
    federation = Federation(config)
    model = federation.build_model()
    each = [
        loss_gradients(model, federation.task, federation.rows, federation.index.train[client], 4)
        for client in records[0]["cohort"]
    ]
    found = load_file(tmp_path / "run" / "adapter" / "fedlora_state.safetensors")
    for name in model.layers:
        total = torch.stack([gradients[name].double() for gradients in each]).sum(0)
        expected = gradient_basis(total, 4, 1e-3)
        for factor, basis in (("lora_A", expected.right), ("lora_B", expected.left)):
            torch.testing.assert_close(found[f"{name}.{factor}.weight"], basis.float(), rtol=0, atol=1e-5)


def test_every_gradient_is_counted_once_on_its_way_up_and_the_basis_on_its_way_down(
    tiny: Compose, tmp_path: Path
) -> None:
    start(tiny(*BASIS, "cohort.size=null"), tmp_path / "run")
    ledger = pd.read_parquet(tmp_path / "run" / "ledger.parquet")
    first = ledger[ledger["round"] == 0]
    up, down = first[first["direction"] == "up"], first[first["direction"] == "down"]
    assert len(up) == len(down) == ledger["client"].nunique()
    assert set(up["setup"]) == {4 * 4 * 32 * 32}  # fp32, query and value of two layers
    assert set(down["setup"]) == set(first["payload"]) == {0}
    assert min(up["message"].tolist()) > 4 * 4 * 32 * 32
    basis = 4 * 4 * 4 * (32 + 32)
    assert [r["setup_bytes"] for r in rounds_of(tmp_path / "run")] == [len(up) * 4 * 4 * 32 * 32, len(up) * basis, 0, 0]


def test_without_rounds_nobody_is_asked(tiny: Compose, tmp_path: Path) -> None:
    start(tiny(*BASIS, "strategy=zero_shot"), tmp_path / "run")
    assert pd.read_parquet(tmp_path / "run" / "ledger.parquet").empty


def gathered(answers: dict[str, ArrayRecord | str]) -> tuple[list[Message], Engine]:
    """What the server hears if the clients answer like this: with a record, or not at all for a reason."""

    def answer(request: Message) -> Message:
        said = answers[str(request.content.config_records["config"]["client-id"])]
        if isinstance(said, str):
            return error_reply(request, said)
        return Message(RecordDict({"setup": said}), reply_to=request)

    engine = Engine(answer)
    return ask(GradientGrid(engine, LAYOUT), list(answers)), engine


def gradients(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full(shape, value) for name, shape in LAYOUT.items()}


def test_a_client_that_fails_or_answers_nonsense_costs_its_own_gradient() -> None:
    replies, _ = gathered({
        "good": wire.pack(gradients(1.0)),
        "broken": wire.pack({**gradients(1.0), "two": torch.tensor([[1.0, float("nan")]])}),
        "small": wire.pack({"one": torch.zeros(2, 3)}),
        "half": wire.pack(gradients(1.0), "bf16"),
        "empty": ArrayRecord(),
        "away": "no connection",
        "fine": wire.pack(gradients(0.5)),
    })  # fmt: skip
    assert [reply.has_error() for reply in replies] == [False, True, True, True, True, True, False]
    assert "'two' holds numbers that are not finite" in str(replies[1].error.reason)
    total = summed(replies)
    assert {name: tuple(value.shape) for name, value in total.items()} == LAYOUT
    assert all(bool((value == 1.5).all()) for value in total.values())


def test_clients_are_sent_no_tensors_for_it() -> None:
    _, engine = gathered({"one": wire.pack(gradients(1.0))})
    assert list(engine.requests[0].content) == ["config"]


def test_a_run_stops_where_no_client_has_a_gradient(tiny: Compose, tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "broken")
    weights = load_file(tiny_bert / "model.safetensors")
    weights["encoder.layer.1.output.dense.bias"][0] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(FedloraError, match=r"Round 0: every client failed.*holds numbers that are not finite"):
        start(tiny(*BASIS, f"backbone.path={tmp_path / 'broken'}"), tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy.refresh=2"], r"strategy\.refresh makes a new basis on the server"),
        (["strategy=local"], r"strategy=local.*fed_sb\[client_gradient\]"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_at_the_start(
    tiny: Compose, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        start(tiny(*BASIS, *overrides), tmp_path / "run")


def test_gradients_of_clients_are_refused_under_privacy(tiny: Compose) -> None:
    config = tiny(*BASIS)
    private = config.privacy.model_copy(update={"name": "client"})
    with pytest.raises(InputError, match=r"sends gradients of the clients' rows as they are, and privacy=client"):
        Federation(config.model_copy(update={"privacy": private}))
