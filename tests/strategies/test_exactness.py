"""Promise 2: a strategy that says exact is exact on random states; one that says approximate is shown not to be."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedlora import wire
from fedlora.adapters import State
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.grid import error_reply
from fedlora.lowrank import relative_distance, weighted_mean
from fedlora.model import AdaptedModel
from simulations.engines.loop import LoopGrid
from strategies import Average, FederatedStrategy, FedEx, FedIT, FlexLoRA, FLoRA
from strategies.base import Reply
from strategies.means import weights
from tests.conftest import Compose

EXAMPLES = (50, 3, 20, 7)
RECTANGULAR = "adapter.target_modules=[query,intermediate.dense,output.dense]"
CASES = {
    "fedit": (FedIT, "method=fedit"),
    "fedex": (FedEx, "method=fedex"),
    "flora": (FLoRA, "method=flora"),
    "flexlora": (FlexLoRA, "method=flexlora"),
    "ffa": (Average, "method=ffa"),
    "fed_sb[gradient]": (Average, "method=fed_sb"),
    "fed_sb[weight]": (Average, "method=fed_sb", "adapter.basis=weight"),
    "fed_sb[seeded]": (Average, "method=fed_sb", "adapter.basis=seeded"),
}


def build(tiny: Compose, case: str, *more: str) -> tuple[FederatedStrategy, AdaptedModel]:
    strategy_class, *overrides = CASES[case]
    federation = Federation(tiny(*overrides, RECTANGULAR, "adapter.alpha=6", *more))
    model = federation.build_model()
    federation.initialise_on_server(model)
    strategy = strategy_class()
    strategy.prepare(model)
    return strategy, model


def random_states(model: AdaptedModel, seed: int, count: int = len(EXAMPLES)) -> list[State]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {key: torch.randn(shape, generator=generator) for key, shape in model.shapes(model.shared).items()}
        for _ in range(count)
    ]


def replies_of(states: Sequence[State], weighting: str = "examples") -> list[Reply]:
    shares = weights(EXAMPLES, weighting)
    return [
        Reply(f"client {i}", state, count, share, 0.5)
        for i, (state, count, share) in enumerate(zip(states, EXAMPLES, shares, strict=True))
    ]


def aggregation_error(strategy: FederatedStrategy, model: AdaptedModel, states: list[State], weighting: str) -> float:
    start = model.read(model.shared)
    for i in range(len(states)):
        strategy.send(f"client {i}", 1, start)
    folded = strategy.fold(1, start, replies_of(states, weighting))
    expected = weighted_mean([model.delta(state) for state in states], list(weights(EXAMPLES, weighting)))
    actual = model.delta(folded)
    for module, residual in strategy.residual().items():
        actual[module] = actual[module] + residual
    return relative_distance(expected, actual)


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
@pytest.mark.parametrize("rslora", ["false", "true"])
@pytest.mark.parametrize("case", CASES)
def test_exact_strategies_are_exact_and_approximate_ones_are_not(
    tiny: Compose, case: str, rslora: str, weighting: str
) -> None:
    strategy, model = build(tiny, case, f"adapter.rslora={rslora}")
    error = aggregation_error(strategy, model, random_states(model, 7), weighting)
    if strategy.exact:
        assert error <= 1e-6
    else:
        assert error > 1e-2


def test_fedex_residual_has_rank_at_most_k_minus_one_times_r(tiny: Compose) -> None:
    strategy, model = build(tiny, "fedex")
    aggregation_error(strategy, model, random_states(model, 3), "examples")
    assert {residual.rank for residual in strategy.residual().values()} == {(len(EXAMPLES) - 1) * 4}


@pytest.mark.parametrize("case", ["fedex", "flora"])
def test_the_base_correction_is_the_sum_of_all_rounds_residuals(tiny: Compose, case: str) -> None:
    strategy, model = build(tiny, case)
    total: dict[str, torch.Tensor] = {}
    for server_round in range(3):
        aggregation_error(strategy, model, random_states(model, server_round), "examples")
        for module, residual in strategy.residual().items():
            total[module] = total.get(module, torch.zeros(residual.shape)) + residual.dense()
    for module, dense in strategy.base_correction().items():
        torch.testing.assert_close(dense, total[module])


@pytest.mark.parametrize("case", ["fedex", "flora"])
def test_a_strategy_restored_from_its_state_goes_on_with_the_same_bits(tiny: Compose, case: str) -> None:
    strategy, model = build(tiny, case)
    aggregation_error(strategy, model, random_states(model, 0), "examples")
    restored, _ = build(tiny, case)
    restored.load_state_dict(strategy.state_dict())
    for one in (strategy, restored):
        aggregation_error(one, model, random_states(model, 1), "examples")
    for module, dense in strategy.base_correction().items():
        assert torch.equal(dense, restored.base_correction()[module])


def test_average_refuses_an_adapter_that_is_not_affine(tiny: Compose) -> None:
    federation = Federation(tiny("method=fedit"))
    with pytest.raises(InputError, match="strategy=average is exact only for affine adapters"):
        Average().prepare(federation.build_meta_model())


@pytest.mark.parametrize("strategy", [FedEx, FLoRA, FlexLoRA])
@pytest.mark.parametrize("adapter", [["method=ffa"], ["method=fed_sb"], ["adapter=dora"]], ids=str)
def test_strategies_of_products_refuse_an_adapter_without_both_factors(
    tiny: Compose, strategy: type[FederatedStrategy], adapter: list[str]
) -> None:
    federation = Federation(tiny(*adapter))
    with pytest.raises(InputError, match=f"strategy={strategy.__name__.lower()} needs adapter=lora"):
        strategy().prepare(federation.build_meta_model())


def exchange(strategy: FederatedStrategy, failing: set[str]) -> tuple[list[Message], list[Message]]:
    """One round of three clients through Flower's own messages."""

    def client(message: Message, _: object) -> Message:
        name = grid.client_of(message.metadata.dst_node_id)
        if name in failing:
            return error_reply(message, "out of memory")
        state = {
            key: value + len(name) for key, value in wire.from_record(message.content.array_records["arrays"]).items()
        }
        metrics = MetricRecord({"num-examples": len(name), "train_loss": 1.0})
        return Message(RecordDict({"arrays": wire.to_record(state), "metrics": metrics}), reply_to=message)

    grid = LoopGrid(client)  # type: ignore[arg-type]
    grid.begin_round(1, ["a", "bb", "ccc"])
    start = wire.to_record({"x": torch.zeros(2, 3)})
    messages = list(strategy.configure_train(1, start, ConfigRecord(), grid))
    for i, message in enumerate(messages):
        message.metadata.__dict__["_message_id"] = f"{i:064x}"
    return messages, grid.send_and_receive(messages)


def test_a_failed_client_costs_its_own_update_and_the_weights_still_sum_to_one() -> None:
    strategy = FedIT()
    _, replies = exchange(strategy, {"bb"})
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    torch.testing.assert_close(wire.from_record(arrays)["x"], torch.full((2, 3), (1 * 1 + 3 * 3) / 4))
    assert metrics["train_loss"] == 1.0


def test_with_no_usable_reply_the_global_state_stays() -> None:
    strategy = FedIT()
    _, replies = exchange(strategy, {"a", "bb", "ccc"})
    assert strategy.aggregate_train(1, replies) == (None, None)


def test_uniform_weighting_ignores_the_number_of_examples() -> None:
    strategy = FedIT(weighting="uniform")
    _, replies = exchange(strategy, set())
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None
    torch.testing.assert_close(wire.from_record(arrays)["x"], torch.full((2, 3), 2.0))
