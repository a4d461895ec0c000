"""Fed-SB with a new basis every few rounds: the model stays the same function, and the basis is a new one."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fedlora.adapters import State
from fedlora.adapters.bases import gradient_basis, weight_basis
from fedlora.adapters.fed_sb import FedSB as Adapter
from fedlora.adapters.fed_sb import oriented_weight
from fedlora.errors import InputError
from fedlora.evaluation import loss_gradients
from fedlora.federation import Federation
from fedlora.lowrank import LowRank, relative_distance
from fedlora.model import AdaptedModel
from fedlora.store import ClientStore
from simulations.plan import plan_run
from simulations.simulate import start
from strategies import FedSB
from strategies.base import Reply, Server
from tests.conftest import Compose
from tests.fedlora.helpers import first_batch, logits, started
from tests.simulations.test_rounds import rounds_of
from tests.strategies.test_exactness import EXAMPLES, RECTANGULAR, random_states, replies_of

BASES = ("gradient", "weight", "seeded")


@dataclass
class Case:
    """A strategy in the middle of a run."""

    federation: Federation
    model: AdaptedModel
    strategy: FedSB
    state: State

    def load(self) -> None:
        """Put the global model into the model."""
        self.model.load({**self.strategy._frozen, **self.state})
        self.model.set_base_correction(self.strategy.base_correction())

    def gradients(self, state: State) -> State:
        self.state = state
        self.load()
        return self.federation.public_gradients(self.model)

    def round(self, server_round: int, clients: int = len(EXAMPLES), size: float = 0.1) -> None:
        """A round in which every client comes back with a random R and head."""
        for client in range(clients):
            self.strategy.send(f"client {client}", server_round, self.state)
        states = [
            {key: size * value for key, value in s.items()} for s in random_states(self.model, server_round, clients)
        ]
        self.state = self.strategy.fold(server_round, self.state, replies(states))

    def update(self) -> dict[str, LowRank]:
        """dW of everything since the start: of R, and of the base."""
        update = self.model.delta(self.state, self.strategy._frozen)
        for module, dense in self.strategy.base_correction().items():
            update[module] = update[module] + LowRank(dense, torch.eye(dense.shape[1]))
        return update

    def outputs(self) -> Tensor:
        self.load()
        return logits(self.model.module, first_batch(self.federation))


def replies(states: list[State]) -> list[Reply]:
    return replies_of(states) if len(states) == len(EXAMPLES) else [Reply("client 0", states[0], 1, 1.0, 0.5)]


@pytest.fixture
def case(tiny: Compose, request: pytest.FixtureRequest) -> Case:
    """Fed-SB with the basis ``request.param`` and a refresh in every second round."""
    federation = Federation(tiny("method=fed_sb", f"adapter.basis={request.param}", RECTANGULAR, "adapter.alpha=6"))
    model = started(federation)
    strategy = FedSB(refresh=2)
    case = Case(federation, model, strategy, model.read(model.shared))
    strategy.prepare(model)
    strategy.begin_run(Server(model.read(model.frozen), case.gradients, federation.capability))
    return case


@pytest.mark.parametrize("case", BASES, indirect=True)
def test_a_refresh_leaves_the_model_the_same_function(case: Case) -> None:
    case.round(1)
    states = random_states(case.model, 2)
    for client in range(len(states)):
        case.strategy.send(f"client {client}", 2, case.state)
    plain = FedSB()
    for client in range(len(states)):
        plain.send(f"client {client}", 2, case.state)
    frozen = dict(case.strategy._frozen)
    mean = plain.fold(2, case.state, replies_of(states))
    kept = Case(case.federation, case.model, plain, mean)
    plain._frozen = frozen
    before, outputs = kept.update(), kept.outputs()

    case.state = case.strategy.fold(2, case.state, replies_of(states))
    assert relative_distance(before, case.update()) <= 1e-6
    torch.testing.assert_close(case.outputs(), outputs, rtol=0, atol=1e-6 * float(outputs.abs().max()))
    assert all(not value.any() for key, value in case.state.items() if ".lora_R." in key)
    assert case.strategy.frozen().keys() == frozen.keys()
    for key, value in case.strategy.frozen().items():
        assert not torch.allclose(value, frozen[key], atol=1e-3), key


@pytest.mark.parametrize("case", BASES, indirect=True)
def test_a_second_refresh_adds_to_the_base(case: Case) -> None:
    case.round(1)
    case.round(2)
    first = {name: value.clone() for name, value in case.strategy.base_correction().items()}
    case.round(3)
    update = case.model.delta(case.state, case.strategy._frozen)
    assert case.strategy.frozen() == case.strategy.residual() == {}
    for module, dense in case.strategy.base_correction().items():
        assert torch.equal(dense, first[module])
    case.round(4)
    assert case.strategy.residual().keys() == update.keys()
    for module, dense in case.strategy.base_correction().items():
        torch.testing.assert_close(dense, first[module] + case.strategy.residual()[module].dense())


@pytest.mark.parametrize("case", ["seeded"], indirect=True)
def test_a_new_seeded_basis_is_orthonormal_and_another_in_every_round(case: Case) -> None:
    found = []
    for server_round in range(1, 5):
        case.round(server_round)
        found.append(dict(case.strategy._frozen))
    for name in case.model.layers:
        rows = [f[f"{name}.lora_A.weight"] for f in (found[0], found[1], found[3])]
        for a in rows:
            torch.testing.assert_close(a @ a.T, torch.eye(len(a)), rtol=0, atol=1e-6)
        assert not torch.allclose(rows[1], rows[0], atol=1e-3)
        assert not torch.allclose(rows[2], rows[1], atol=1e-3)


@pytest.mark.parametrize("case", ["weight"], indirect=True)
def test_a_new_weight_basis_is_that_of_the_weight_and_all_that_was_added(case: Case) -> None:
    case.round(1)
    case.round(2, size=1.0)
    for name, layer in case.model.layers.items():
        weight = oriented_weight(layer) + case.strategy.base_correction()[name]  # type: ignore[arg-type]
        expected = weight_basis(weight, 4)
        assert torch.equal(case.strategy.frozen()[f"{name}.lora_A.weight"], expected.right)
        assert torch.equal(case.strategy.frozen()[f"{name}.lora_B.weight"], expected.left)


@pytest.mark.parametrize("case", ["gradient"], indirect=True)
def test_a_new_gradient_basis_is_that_of_the_model_with_its_updates_merged(case: Case) -> None:
    case.round(1)
    case.round(2)
    federation, adapter = case.federation, case.model.adapter
    assert isinstance(adapter, Adapter)
    merged = federation.build_model()  # R = 0
    merged.load({key: case.state[key] for key in merged.head})
    with torch.no_grad():
        for name, layer in merged.layers.items():
            layer.get_base_layer().weight += case.strategy.base_correction()[name]  # type: ignore[operator]
    gradients = loss_gradients(merged, federation.task, federation.rows, federation.index.public, 3)
    for name, gradient in gradients.items():
        a, b = (case.strategy.frozen()[f"{name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        step = -torch.sign(gradient)
        best = gradient_basis(gradient, 4, 1.0)
        captured, most = (step - b @ b.T @ step @ a.T @ a).norm(), (step - best.left * best.core @ best.right).norm()
        assert captured <= most + 1e-2 * step.norm()  # a few signs of almost zeros may differ


@pytest.mark.parametrize("case", ["seeded"], indirect=True)
def test_a_client_is_sent_what_its_base_lacks_once(case: Case) -> None:
    case.round(1)
    case.round(2)
    sent = case.strategy.send("client 0", 3, case.state).correction
    assert sent is not None
    assert (sent.since, sent.until) == (0, 1)
    case.round(3, clients=1)
    assert case.strategy.send("client 0", 4, case.state).correction is None
    assert case.strategy.send("client 1", 4, case.state).correction is not None


@pytest.mark.parametrize("basis", BASES)
def test_a_run_is_exact_in_every_round_and_counts_every_new_basis(tiny: Compose, tmp_path: Path, basis: str) -> None:
    overrides = ["method=fed_sb", f"adapter.basis={basis}", "strategy.refresh=2", "cohort.size=null", "rounds=5"]
    start(tiny(*overrides), tmp_path / "run")
    records = rounds_of(tmp_path / "run")[1:]
    assert max(record["aggregation_error"] for record in records) <= 1e-6
    clients = len(records[0]["cohort"])
    whole = clients * 4 * 4 * 4 * (32 + 32)  # fp32, rank 4, query and value of two layers
    first, later = (whole if basis == "gradient" else 0), (0 if basis == "seeded" else whole)
    assert [r["setup_bytes"] for r in records] == [first, 0, later, 0, later]
    downs = [record["payload_down"] - record["payload_up"] for record in records]
    assert downs == [0, 0, whole, 0, whole]  # the residuals are as large as the basis


def test_a_client_draws_the_newest_seeded_basis_itself(tiny: Compose, tmp_path: Path) -> None:
    """Also one that was away for several of them; and it is the server's, bit by bit."""
    config = tiny("method=fed_sb", "adapter.basis=seeded", "strategy.refresh=2", "cohort.size=2", "rounds=11")
    planned, summary = plan_run(config), start(config, tmp_path / "run")
    assert summary["totals"]["setup_bytes"] == planned["setup_bytes"] == 0
    store = ClientStore(tmp_path / "run" / "clients")
    rounds = [(r["round"], client) for r in rounds_of(tmp_path / "run")[1:] for client in r["cohort"]]
    seen: dict[str, list[int]] = {client: [r for r, who in rounds if who == client] for _, client in rounds}
    assert any(after - before > 4 for took_part in seen.values() for before, after in pairwise(took_part))
    for client, took_part in seen.items():
        newest = (took_part[-1] - 1) // 2 * 2
        assert store.read(client, 1000).references.get("setup") == (f"basis-{newest}" if newest else None)
    saved = load_file(tmp_path / "run" / "adapter" / "fedlora_state.safetensors")
    drawn = store.get_shared("basis-10")
    assert drawn
    assert all(torch.equal(value, saved[key]) for key, value in drawn.items())


def test_a_run_takes_the_gradients_of_the_new_basis_at_its_present_model(tiny: Compose, tmp_path: Path) -> None:
    config = tiny("method=fed_sb", "strategy.refresh=1", "rounds=1", "client.lr=0.3", "adapter.basis_step=0.1")
    start(config, tmp_path / "run")
    folder = tmp_path / "run" / "adapter"
    saved, correction = (
        load_file(folder / "fedlora_state.safetensors"),
        load_file(folder / "base_correction.safetensors"),
    )
    head = load_file(folder / "adapter_model.safetensors")
    federation = Federation(config)
    model = federation.build_model()
    model.load({key: head[f"base_model.model.{key}"] for key in model.head})
    model.set_base_correction(correction)
    for name, gradient in federation.public_gradients(model).items():
        expected = gradient_basis(gradient, 4, 0.1)
        torch.testing.assert_close(saved[f"{name}.lora_A.weight"], expected.right, rtol=0, atol=1e-5)
        torch.testing.assert_close(saved[f"{name}.lora_B.weight"], expected.left, rtol=0, atol=1e-5)


def test_a_refresh_needs_a_positive_number_and_an_r(tiny: Compose) -> None:
    with pytest.raises(InputError, match=r"strategy\.refresh = 0 is not valid"):
        FedSB(refresh=0)
    federation = Federation(tiny("method=ffa"))
    with pytest.raises(InputError, match=r"adapter=ffa has none\. Use adapter=fed_sb"):
        FedSB().prepare(federation.build_meta_model())


def test_kept_moments_are_refused_where_a_new_basis_makes_them_meaningless(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"client\.keep_optimizer=true has no effect with FedSB"):
        start(tiny("method=fed_sb", "strategy.refresh=2", "client.keep_optimizer=true"), tmp_path / "run")
