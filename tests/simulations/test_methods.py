"""Every registered method keeps the promises of its kind: whatever is in ``conf/method`` is tested.

That it trains, and sends what its plan says, is in :mod:`tests.simulations.test_rounds`; that the engines agree on it,
in :mod:`tests.simulations.test_cohort`. Methods that choose their own backbone are in
:mod:`tests.simulations.test_personal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from fedlora.adapters import State
from fedlora.capability import Capability
from fedlora.export import export_adapter
from fedlora.federation import Federation
from fedlora.grid import parts_of
from fedlora.lowrank import relative_distance, weighted_mean
from fedlora.model import AdaptedModel
from simulations.compose import choices_of
from simulations.plan import list_methods
from strategies.base import FederatedStrategy, Reply, Server
from strategies.build import build_strategy
from strategies.means import completed, weights
from tests.conftest import Compose
from tests.fedlora.helpers import (
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

EXAMPLES = (50, 3, 20, 7)
METHODS = {each["method"]: each for each in list_methods() if "backbone" not in choices_of(each["method"])}
AGGREGATES = [name for name, each in METHODS.items() if each["exact"] is not None]
BASELINES = ("central", "local", "zero_shot")
ROOM = {  # every owner has rows of its own among 32, and two of the four clients have the same owner
    "disjoint": ["adapter.rank=2"],
    "o_lora": ["adapter.groups=3"],
}


@pytest.fixture(params=["tiny_bert", "tiny_gpt2"])
def architecture(request: pytest.FixtureRequest) -> list[str]:
    """Linear layers with m != n, and GPT-2's transposed Conv1D."""
    return of_architecture(request.param, request.getfixturevalue(request.param))


def ready(federation: Federation) -> tuple[FederatedStrategy, AdaptedModel]:
    model = started(federation)
    return begun(federation, model, model.read(model.frozen)), model


def begun(federation: Federation, model: AdaptedModel, frozen: State) -> FederatedStrategy:
    """The strategy of a run that starts, or is resumed, with these frozen tensors."""
    strategy = build_strategy(federation.config.strategy, model)
    assert isinstance(strategy, FederatedStrategy)
    strategy.begin_run(Server(frozen, lambda state: federation.public_gradients(model), federation.capability))
    return strategy


def far_replies(strategy: FederatedStrategy, model: AdaptedModel, state: State, server_round: int) -> list[Reply]:
    """What clients could send back: random numbers for all that they were asked to train."""
    generator = torch.Generator().manual_seed(server_round)
    replies = []
    clients = model.adapter.clients[: len(EXAMPLES)]
    for client, count, share in zip(clients, EXAMPLES, weights(EXAMPLES, "examples"), strict=True):
        out = strategy.send(client, server_round, state)
        layout = model.answer_layout(Capability(), parts_of(out.instructions))
        sent = {key: 0.5 * torch.randn(shape, generator=generator) for key, shape in layout.items()}
        replies.append(Reply(client, completed(sent, state), count, share, 0.5))
    return replies


def errors_of(strategy: FederatedStrategy, model: AdaptedModel, rounds: int) -> list[float]:
    """The aggregation error of every round, from the definition."""
    state, frozen, errors = model.read(model.shared), model.read(model.frozen), []
    for server_round in range(1, rounds + 1):
        replies = far_replies(strategy, model, state, server_round)
        deltas: Sequence = [model.delta({**model.own_of(r.client), **r.state}, frozen) for r in replies]
        shares = strategy.shares([r.client for r in replies], EXAMPLES)
        expected = {name: mean.scale(sum(shares)) for name, mean in weighted_mean(deltas, shares).items()}
        state = strategy.fold(server_round, state, replies)
        frozen = strategy.frozen() or frozen
        actual = model.delta(state, frozen)
        for module, residual in strategy.residual().items():
            actual[module] = actual[module] + residual
        errors.append(relative_distance(expected, actual))
    return errors


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", AGGREGATES)
def test_a_method_aggregates_as_exactly_as_it_says(
    tiny: Compose, architecture: list[str], method: str, scale: str
) -> None:
    overrides = [f"method={method}", *architecture, *SCALES[scale], *ROOM.get(method, [])]
    strategy, model = ready(Federation(tiny(*overrides)))
    errors = errors_of(strategy, model, 3)
    if strategy.exact:
        assert max(errors) <= 1e-6
    else:
        assert min(errors) > 1e-3


@pytest.mark.parametrize("method", [m for m in METHODS if m not in BASELINES])
def test_what_a_method_trained_is_saved_for_others(
    tiny: Compose, tmp_path: Path, architecture: list[str], method: str
) -> None:
    federation = Federation(tiny(f"method={method}", *architecture, *SCALES["alpha"], *ROOM.get(method, [])))
    model, batch = started(federation), first_batch(federation)
    model.load(random_state(model, model.shared + model.private))
    head = model.read(model.head)
    state = model.read(key for key in model.trainable if key not in model.head)
    export_adapter(federation, tmp_path, state, model.read(model.frozen + model.own), {}, head)
    loaded = PeftModel.from_pretrained(bare_backbone(federation), str(tmp_path)).eval()
    torch.testing.assert_close(logits(loaded, batch), logits(model.module, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", AGGREGATES)
def test_a_method_goes_on_from_its_saved_state(tiny: Compose, method: str) -> None:
    federation = Federation(tiny(f"method={method}"))
    strategy, model = ready(federation)
    start = model.read(model.shared)
    first = strategy.fold(1, start, far_replies(strategy, model, start, 1))
    restored = begun(federation, model, strategy.frozen() or model.read(model.frozen))
    restored.load_state_dict(strategy.state_dict())
    one, other = (each.fold(2, first, far_replies(each, model, first, 2)) for each in (strategy, restored))
    assert_same(one, other)
    assert_same(strategy.frozen(), restored.frozen())
    assert_same(strategy.base_correction(), restored.base_correction())


def test_the_listing_says_what_each_strategy_promises() -> None:
    for name, each in METHODS.items():
        assert each["exact"] in (True, False, None), name
        assert each["lr"] > 0, name
        assert each["description"], name
