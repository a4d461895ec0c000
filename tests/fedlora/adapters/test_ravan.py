"""Promises of RAVAN: orthogonal heads from the seed, products on the wire, and an average that is one of products."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from transformers.pytorch_utils import Conv1D

from fedlora import wire
from fedlora.adapters import State
from fedlora.adapters.base import ADAPTER_NAME
from fedlora.adapters.factored import modules_of
from fedlora.adapters.ravan import head_names
from fedlora.client import Worker
from fedlora.errors import InputError
from fedlora.export import export_adapter, export_merged
from fedlora.federation import Federation
from fedlora.lowrank import LowRank, relative_distance
from fedlora.model import AdaptedModel
from fedlora.store import ClientStore
from simulations.plan import plan_run
from simulations.simulate import resume, start
from strategies import Ravan
from strategies.base import Reply
from strategies.means import weights
from tests.conftest import Compose
from tests.fedlora.helpers import (
    FACTORS,
    SCALES,
    TARGETS,
    assert_same,
    bare_backbone,
    first_batch,
    logits,
    of_architecture,
    random_state,
    request,
    started,
)
from tests.simulations.test_cohort import assert_engines_agree
from tests.simulations.test_resume import KillAt, Killed, assert_same_run

# PEFT's own loader still asks transformers for a name that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

HEADS, RANK = 3, 4
SIZE = ["method=ravan", f"adapter.heads={HEADS}", f"adapter.rank={RANK}"]
EXAMPLES = (50, 3, 20, 7)


@pytest.fixture(params=TARGETS)
def architecture(request: pytest.FixtureRequest) -> list[str]:
    """Linear layers with m != n, and GPT-2's transposed Conv1D."""
    return of_architecture(request.param, request.getfixturevalue(request.param))


@pytest.fixture(params=SCALES)
def scaled(request: pytest.FixtureRequest, tiny: Compose, architecture: list[str]) -> tuple[Federation, float]:
    """A federation with alpha != r, and its scale s."""
    return Federation(tiny("method=ravan", *architecture, *SCALES[request.param], f"adapter.heads={HEADS}")), FACTORS[
        request.param
    ]


def heads_by_hand(state: State, module: str, scale: float) -> torch.Tensor:
    """s sum_i s_i B_i H_i A_i, one head after the other."""
    return scale * sum(one_head(state, module, i) for i in range(HEADS))  # type: ignore[return-value]


def one_head(state: State, module: str, i: int) -> torch.Tensor:
    """s_i B_i H_i A_i."""
    b, square, factor, a = (
        state[f"{module}.{name}"].double()
        for name in ("lora_B.weight", f"lora_H.head{i}.weight", f"lora_H.head{i}.scale", "lora_A.weight")
    )
    r = len(square)
    return factor * b[:, i * r : (i + 1) * r] @ square @ a[i * r : (i + 1) * r]


def far(model: AdaptedModel, seed: int = 0) -> State:
    """Squares and head scalars far from their start."""
    return random_state(model, [key for key in model.trainable if key not in model.head], seed)


def test_a_layer_adds_the_sum_of_its_heads(scaled: tuple[Federation, float]) -> None:
    federation, scale = scaled
    model = started(federation)
    state = far(model)
    model.load(state)
    full = {**model.read(model.frozen), **state}
    deltas = model.delta(state)
    assert list(deltas) == list(model.layers)
    for name, layer in model.layers.items():
        expected = heads_by_hand(full, name, scale)
        assert expected.norm() > 0.1
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            change = layer(x) - layer.get_base_layer()(x)
        torch.testing.assert_close(change.double(), x.double() @ expected.T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(deltas[name].dense().double(), expected, rtol=1e-5, atol=1e-6)
        merged = layer.get_delta_weight(ADAPTER_NAME).detach().double()
        oriented = merged.T if isinstance(layer.get_base_layer(), Conv1D) else merged
        torch.testing.assert_close(oriented, expected, rtol=1e-5, atol=1e-6)


def test_the_model_starts_as_the_backbone_and_every_head_learns_from_the_first_step(
    tiny: Compose, architecture: list[str]
) -> None:
    federation = Federation(tiny(*SIZE, *architecture))
    model = started(federation)
    batch = first_batch(federation)
    assert torch.equal(logits(model.module, batch), logits(bare_backbone(federation), batch))
    model.own_trainables()
    federation.task.loss(model.module, batch).backward()
    for name, layer in model.layers.items():
        for head in layer.lora_H[ADAPTER_NAME].values():
            assert head.weight.grad.norm() > 0, name
            assert not head.scale.grad.any(), name  # H is 0


def test_the_heads_of_a_layer_are_orthonormal_and_orthogonal_to_each_other(
    tiny: Compose, architecture: list[str]
) -> None:
    model = Federation(tiny(*SIZE, *architecture)).build_model()
    frozen, size = model.read(model.frozen), HEADS * RANK
    assert len(frozen) == 2 * len(model.layers)
    for module in model.layers:
        a, b = (frozen[f"{module}.lora_{factor}.weight"].double() for factor in "AB")
        assert (a @ a.T - torch.eye(size)).abs().max() <= 1e-6
        assert (b.T @ b - torch.eye(size)).abs().max() <= 1e-6


def test_the_basis_depends_on_the_seed_and_the_layer_only(tiny: Compose) -> None:
    def basis(*overrides: str) -> State:
        model = Federation(tiny(*SIZE, "adapter.target_modules=[query,key]", *overrides)).build_model()
        return model.read(model.frozen)

    first = basis()
    torch.randn(3)  # whoever drew before must not matter
    assert_same(basis(), first)
    others = basis("seed=2")
    assert not any(torch.equal(first[key], others[key]) for key in first)
    values = [value for key, value in first.items() if ".lora_A." in key]
    assert not any(torch.equal(one, two) for i, one in enumerate(values) for two in values[:i])
    fewer = basis("adapter.target_modules=[key]")
    assert fewer
    assert all(torch.equal(value, first[key]) for key, value in fewer.items())


def replies_of(states: Sequence[State]) -> list[Reply]:
    shares = weights(EXAMPLES, "examples")
    return [
        Reply(f"client {i}", state, count, share, 0.5)
        for i, (state, count, share) in enumerate(zip(states, EXAMPLES, shares, strict=True))
    ]


def test_the_average_of_products_is_exact_and_that_of_squares_and_scalars_is_not(
    scaled: tuple[Federation, float],
) -> None:
    federation, scale = scaled
    model = started(federation)
    frozen = model.read(model.frozen)
    states = [far(model, seed) for seed in range(len(EXAMPLES))]
    shares = weights(EXAMPLES, "examples")
    eye = {module: torch.eye(int(layer.in_features)).double() for module, layer in model.layers.items()}
    expected = {
        module: LowRank(
            sum(p * heads_by_hand({**frozen, **s}, module, scale) for p, s in zip(shares, states, strict=True)),  # type: ignore[arg-type]
            eye[module],
        )
        for module in model.layers
    }
    strategy = Ravan()
    strategy.prepare(model)

    def error(sent: Sequence[State], keys: Sequence[str]) -> float:
        states = [{key: state[key] for key in keys} for state in sent]
        folded = strategy.fold(1, model.read(keys), replies_of(states))
        return relative_distance(expected, model.delta(folded))

    products = [key for key in model.shared if key not in model.head]
    assert error([federation.adapter.settled(state) for state in states], products) <= 1e-6
    assert error(states, [*products, *model.rounds]) > 1e-2  # the mean of H times the mean of s


def test_a_client_sends_products_only_and_begins_the_next_round_with_scalars_of_one(
    tiny: Compose, tmp_path: Path
) -> None:
    federation = Federation(tiny(*SIZE, "client.local_epochs=3"))
    worker = Worker(federation, ClientStore(tmp_path))
    model, client = worker.model, federation.clients[0]
    assert len(model.rounds) == len(model.layers) * HEADS
    arrays = wire.pack(model.read(model.shared))
    job = worker.open(request(1, arrays, **{"client-id": client}))
    trained = worker.trainer.train([job.member])[0]
    reply = worker.close(job, trained)
    layout = worker.answer_layout(client)
    numbers = sum(torch.Size(shape).numel() for key, shape in layout.items() if key not in model.head)
    assert numbers == len(model.layers) * HEADS * RANK**2
    assert not set(layout) & set(model.rounds)
    sent = wire.unpack(reply.content.array_records["arrays"], layout)
    for module in modules_of(sent):
        for name in head_names(range(HEADS)):
            scalar = trained.state[f"{module}.lora_H.{name}.scale"]
            assert scalar != 1
            product = trained.state[f"{module}.lora_H.{name}.weight"] * scalar
            assert torch.equal(sent[f"{module}.lora_H.{name}.weight"], product)
    again = worker.open(request(1, wire.pack(sent), **{"client-id": client, "server-round": 2}))
    for key in model.rounds:
        assert torch.equal(again.member.state[key], torch.ones(1))


def test_a_client_alone_keeps_products_and_scalars_of_one(tiny: Compose, tmp_path: Path) -> None:
    start(tiny("adapter=ravan", "strategy=local", "adapter.heads=3", "cohort.size=null", "rounds=2"), tmp_path / "run")
    store = ClientStore(tmp_path / "run" / "clients")
    kept = [store.read(client, 1000).private for client in store.clients()]
    scalars = [value for state in kept for key, value in state.items() if key.endswith(".scale")]
    assert scalars
    assert all(torch.equal(value, torch.ones(1)) for value in scalars)
    assert all(value.any() for state in kept for key, value in state.items() if ".lora_H." in key)


def test_peft_loads_the_heads_as_one_plain_lora(scaled: tuple[Federation, float], tmp_path: Path) -> None:
    federation, _ = scaled
    model, batch = started(federation), first_batch(federation)
    model.load(random_state(model, (*model.shared, *model.private)))
    head = model.read(model.head)
    state = model.read(key for key in model.shared if key not in head)
    expected = logits(model.module, batch)
    export_adapter(federation, tmp_path / "adapter", state, model.read(model.frozen), {}, head)
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert config.r == HEADS * RANK  # type: ignore[attr-defined]
    loaded = PeftModel.from_pretrained(bare_backbone(federation), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=1e-4, atol=1e-5)
    assert (expected - logits(bare_backbone(federation), batch)).abs().max() > 1e-2
    export_merged(federation, tmp_path / "merged", state, model.read(model.frozen), {}, head)
    merged = federation.task.auto_class.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-4, atol=1e-5)


def test_the_plan_counts_what_clients_of_different_modules_send(tiny: Compose, tmp_path: Path) -> None:
    weak = ["adapter.target_modules=[query,value]", "adapter.client_modules=[all,value]", "cohort.size=null"]
    config = tiny(*SIZE, *weak)
    planned, summary = plan_run(config), start(config, tmp_path / "run")
    for key in ("payload_up", "payload_down", "setup_bytes"):
        assert summary["totals"][key] == planned[key], key
    assert summary["totals"]["setup_bytes"] == 0
    assert summary["aggregation_error"]["max"] <= 1e-6


@pytest.mark.parametrize("knobs", [["client.keep_optimizer=true"], ["client.local_steps=3", "adapter.head=private"]])
def test_a_cohort_trains_the_heads_of_every_client_as_the_loop_does(
    tiny: Compose, tmp_path: Path, knobs: list[str]
) -> None:
    assert Worker(Federation(tiny(*SIZE)), ClientStore(tmp_path / "store")).share_steps() is None
    assert_engines_agree(tiny, tmp_path, *SIZE, "cohort.size=null", *knobs)


def test_a_killed_run_resumes_to_the_same_bits(tiny: Compose, tmp_path: Path) -> None:
    config = tiny(*SIZE, "client.keep_optimizer=true", "cohort.size=null")
    start(config, tmp_path / "whole")
    with pytest.raises(Killed):
        start(config, tmp_path / "killed", callbacks=[KillAt(client=15)])
    resume(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (["adapter.heads=9", "adapter.rank=4"], r"36 orthogonal directions, and layer '.*query' .*adapter\.heads <= 8"),
        (["adapter.heads=3", "adapter.rank=16"], r"adapter\.heads <= 2 at this rank, or adapter\.rank <= 10"),
        (["adapter.heads=1", "adapter.rank=40"], r"adapter\.rank = 40 is larger than layer"),
        (["adapter.heads=0"], r"adapter\.heads"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_heads_that_do_not_fit_a_layer_are_refused(tiny: Compose, sizes: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Federation(tiny("method=ravan", *sizes)).build_meta_model()


def test_tables_say_how_many_heads(tiny: Compose) -> None:
    assert Federation(tiny(*SIZE)).adapter.label == "ravan[3x4]"
