"""The aggregation error of a round: how far the aggregate's dW is from the exact mean of the clients' dW."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from fedlora import wire
from fedlora.adapters import State
from fedlora.adapters.lora import Lora
from fedlora.lowrank import LowRank, relative_distance, weighted_mean
from fedlora.model import AdaptedModel
from simulations.probes import probes
from strategies.base import FederatedStrategy
from strategies.means import completed, exact_mean, mean_of_trainers, weights
from strategies.stacking import mean_update


class Exactness:
    """Measures one round after the other: what is expected is taken before the strategy sees the replies.

    Some strategies consume them, and one that changes them must not be measured against its own changes.
    """

    def __init__(self, model: AdaptedModel, strategy: FederatedStrategy | None, seed: int) -> None:
        """``strategy``: ``None`` for a strategy of Flower, which averages by examples; ``seed``: of the probes."""
        self.model, self.strategy, self.seed = model, strategy, seed
        self._expected: dict[str, LowRank] | None = None
        self._probes: dict[str, Tensor] = {}

    def expect(self, replies: Sequence[Message], owners: Sequence[str], sent: State, frozen: State) -> None:
        """Take the exact mean of the clients' dW (or their sum: ``shares`` of the strategy). Nothing else is kept.

        Args:
            replies: of the round, failed ones too.
            owners: the client of each.
            sent: the global state that they started from.
            frozen: the frozen tensors.
        """
        self._expected, self._probes = None, {}
        if self.strategy is not None and self.strategy.exact is None:
            return
        usable = [
            (client, reply.content)
            for client, reply in zip(owners, replies, strict=True)
            if not reply.has_error() and "arrays" in reply.content
        ]
        if not usable:
            return
        clients, contents = zip(*usable, strict=True)
        examples = [int(cast(int, cast(MetricRecord, content["metrics"])["num-examples"])) for content in contents]
        ours = self.strategy
        shares = weights(examples, "examples") if ours is None else ours.shares(clients, examples)
        states = [wire.from_record(cast(ArrayRecord, content["arrays"])) for content in contents]
        self._expected = self._mean(clients, states, shares, sent, frozen)

    def error(self, state: State, frozen: State) -> float | str:
        """The relative distance of the aggregate from what was expected, or the reason why it has no meaning.

        Args:
            state: the global state that the strategy has made of the replies.
            frozen: the frozen tensors that belong to it.
        """
        if self.strategy is not None and self.strategy.exact is None:
            return "no aggregation"
        if self._expected is None:
            return "no replies"
        actual = self.model.delta(state, frozen)
        for module, residual in self.strategy.residual().items() if self.strategy is not None else ():
            actual[module] = actual[module] + residual
        expected, self._expected = self._expected, None
        return relative_distance(expected, {module: self._seen(module, delta) for module, delta in actual.items()})

    def _mean(
        self, clients: Sequence[str], replies: list[State], shares: Sequence[float], sent: State, frozen: State
    ) -> dict[str, LowRank]:
        """The exact mean, by the way that costs least.

        Of a strategy that averages each tensor over its trainers it is what it promises: that mean, in fp64. Where dW
        is affine by its formula it is the dW of the mean. LoRA's products are made block by block, and only seen
        through a few directions where the cohort is large. Products are in fp64 where the strategy promises to be
        exact; next to the error of others the 3e-7 of fp32 is nothing, and costs half.
        """
        model, ours = self.model, self.strategy
        states = [completed(state, sent) for state in replies]
        if model.affinity.affine and model.affinity.error is None:
            compared = [key for key in states[0] if key not in model.head]
            if ours is not None and ours.over_trainers:
                trained = [frozenset(state) for state in replies]
                mean = mean_of_trainers({key: sent[key] for key in compared}, states, shares, trained)
            else:
                mean = exact_mean(states, shares, compared)
            return model.delta(mean, {key: value.double() for key, value in frozen.items()})
        dtype = torch.float64 if ours is not None and ours.exact else torch.float32
        if type(model.adapter) is not Lora:
            own = zip(states, clients, strict=True)
            deltas = (model.delta({**model.own_of(client), **state}, frozen) for state, client in own)
            whole = math.fsum(shares)  # 1 where the aggregate is a mean
            return {name: mean.scale(whole) for name, mean in weighted_mean(deltas, shares, dtype).items()}
        self._probes = probes(states, self.seed)
        if self._probes:
            return mean_update(model.adapter, states, shares, seen=self._seen)
        return mean_update(model.adapter, states, shares, dtype=dtype)

    def _seen(self, module: str, delta: LowRank) -> LowRank:
        """``delta``, or what the probe of its module sees of it."""
        probe = self._probes.get(module)
        return delta if probe is None else delta.through(probe)
