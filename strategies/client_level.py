"""Client-level differential privacy around a strategy: what it aggregates is one noisy mean, the same for everybody.

The replies of a round are clipped, summed and given noise (:mod:`fedlora.privacy.client_level`) before the strategy
sees them; then every reply is replaced by that mean, with one example. Whatever the strategy makes of it (a momentum,
an adaptive step, new factors of the same product) is computed from numbers that are private already. It must be one
that averages what it gets, and that is known of those named in :data:`STRATEGIES` only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedlora import wire
from fedlora.adapters import State
from fedlora.config import PrivacyConfig
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from fedlora.privacy.client_level import clipped_sum, epsilon_of, moved, next_clip, split_noise, update_of
from fedlora.privacy.randomness import Seeded, System
from fedlora.privacy.statement import privacy_summary
from fedlora.protocol import CLIP, EXAMPLES, LOSS, NOISE
from fedlora.seeding import derive_seed
from strategies.average import Average
from strategies.fed_sb import FedSB
from strategies.fedsvd import FedSVD

STRATEGIES: tuple[type[Strategy], ...] = (
    Average, FedSB, FedSVD, flower.FedAvg, flower.FedAvgM, flower.FedAdam, flower.FedYogi, flower.FedAdagrad,
)  # fmt: skip
"""Those that make the next global state of the mean of the shared tensors alone. A subclass may do otherwise."""
REASONS: dict[str, str] = {
    "FedIT": "averages A and B one by one, so that the noise of one is multiplied with the other and no bound on the "
    "factors is one on the update",
    "FedEx": "puts products of single clients' factors into the base, which a mean does not give",
    "FLoRA": "stacks the clients' factors one by one",
    "FlexLoRA": "multiplies each client's own factors",
    "Disjoint": "keeps every client's block apart, so that there is no sum for a client to hide in",
    "OLora": "sums groups of clients apart",
    "Ravan": "averages each head over the clients that trained it, whose number changes with every client",
    "RoLoRA": "trains other tensors in every round, so that the norm of one update bounds half of a step",
    "FedSA": "leaves a part of the model at each client",
    "PersonalLora": "leaves a part of the model at each client",
    "PFedLoRA": "leaves models of their own at the clients",
    "FedProto": "averages prototypes over rows, and not updates over clients",
    "Central": "pools the rows of clients",
    "Local": "sends nothing that would need protection",
    "ZeroShot": "trains nothing",
}


def require_client_level(strategy: Strategy, model: AdaptedModel, settings: PrivacyConfig, dtype: str) -> None:
    """Refuse whatever a client could change by more than the clipping norm over n.

    Args:
        strategy: of the run.
        model: with its adapter, real or on the meta device.
        settings: of privacy.
        dtype: of shared tensors on the wire.

    Raises:
        InputError: the guarantee would not be what it says; the message says why, and what to use.
    """
    name, adapter = type(strategy).__name__, model.adapter
    if type(strategy) not in STRATEGIES:
        known = ", ".join(each.__name__ for each in STRATEGIES)
        raise InputError(
            f"privacy=client is not known to hold with {name}, which "
            f"{REASONS.get(name, 'is not known to use nothing but the mean of the updates')}. Use one of: {known}."
        )
    if not model.affinity.affine:
        raise InputError(
            f"privacy=client bounds what a client changes in the shared tensors, and with adapter={adapter.label}, "
            "which is not affine, that is no bound on the model's update. Use an affine one, such as adapter=ffa or "
            "adapter=fed_sb."
        )
    if getattr(strategy, "weighting", "uniform") != "uniform":
        raise InputError(
            "privacy=client gives every client the same weight, or one with many rows could change more than others. "
            "Use strategy.weighting=uniform."
        )
    if getattr(strategy, "fraction_train", 1.0) != 1.0:
        raise InputError("privacy=client draws the cohort itself. Use strategy.fraction_train=1.0 and cohort.size.")
    if kept := model.private + model.rounds + model.own:
        raise InputError(
            f"privacy=client covers what is shared, and adapter={adapter.label} keeps '{kept[0]}' at each client. Use "
            "an adapter that shares all it trains, with adapter.head=shared or adapter.head=frozen."
        )
    config = adapter.config
    for setting, value in (
        ("client_ranks", adapter.client_ranks),
        ("client_heads", adapter.client_heads),
        ("client_modules", config.client_modules),
    ):
        if value is not None:
            raise InputError(
                f"privacy=client hides a client among others that send the same tensors, and adapter.{setting} lets "
                f"clients send different ones. Use adapter.{setting}=null."
            )
    if adapter.needs_client_gradients:
        raise InputError(f"adapter={adapter.label} sends gradients of clients, which privacy=client does not cover.")
    if settings.noise == "clients" and dtype != "fp32":
        raise InputError(
            f"wire.dtype={dtype} rounds what a client sends after its noise was added, so that clients could differ by "
            "more than the clipping norm. Use wire.dtype=fp32, or privacy.noise=server."
        )


@dataclass(frozen=True)
class Budget:
    """What a run may spend, settled before it starts.

    Attributes:
        noise_multiplier: standard deviation of the noise of the sum over the clipping norm.
        delta: for which epsilon holds.
        clients: n, the cohort size that is expected, by which the sum is divided.
        rate: with which a client takes part where nobody learns who did, else ``None``.
        times: how often the client drawn most often has been drawn after each round, from round 0; with ``rate`` the
            number of rounds.
    """

    noise_multiplier: float
    delta: float
    clients: int
    rate: float | None
    times: tuple[int, ...]


class ClientLevel:
    """The mechanism of a run: its budget, and the clipping norm of the next round.

    Attributes:
        clip: that norm.
    """

    def __init__(self, settings: PrivacyConfig, budget: Budget, seed: int | None) -> None:
        """``seed``: of a simulation's noise; ``None``: the noise comes from the operating system."""
        assert settings.clip is not None
        self.settings, self.budget, self.seed = settings, budget, seed
        self.clip = settings.clip

    def epsilon(self, server_round: int) -> float | None:
        """What is spent after ``server_round``; ``None`` without noise."""
        budget = self.budget
        spent = epsilon_of(
            budget.noise_multiplier, budget.times[server_round], budget.delta, self.settings.accountant, budget.rate
        )
        return None if math.isinf(spent) else spent

    def summary(self) -> dict[str, Any]:
        """The object ``privacy`` of ``summary.json``, for the whole run."""
        budget, settings = self.budget, self.settings
        assert settings.clip is not None
        return privacy_summary(
            "client",
            self.epsilon(len(budget.times) - 1),
            budget.delta,
            budget.noise_multiplier,
            settings.clip,
            settings.accountant,
            condition="" if budget.rate is None else "or who, and how many, took part in a round",
            deployed=self.seed is None,
        )

    def instructions(self) -> dict[str, Any]:
        """What every message of the next round tells its client to do before it sends."""
        if self.settings.noise == "server":
            return {}
        share = self.budget.noise_multiplier * self.clip / math.sqrt(self.budget.clients)
        return {CLIP: self.clip, NOISE: share}

    def release(
        self, server_round: int, sent: State, requests: Sequence[Message], replies: Sequence[Message], whole: bool
    ) -> list[Message]:
        """The replies of a round with the noisy mean instead of what each client sent.

        Args:
            server_round: keys the noise.
            sent: the global state that the clients started from.
            requests: of the strategy, at least one.
            replies: some may be errors, which are dropped: a client that fails contributes nothing, and n stays.
            whole: whether the strategy must know who answered; otherwise there is one reply, whose mean is itself to
                the last bit.

        Returns:
            At least one reply.
        """
        usable = [reply for reply in replies if not reply.has_error()]
        states = (wire.from_record(cast(ArrayRecord, reply.content["arrays"])) for reply in usable)
        updates = (update_of(state, sent) for state in states)
        total = self._noisy_sum(server_round, updates, sum(tensor.numel() for tensor in sent.values()))
        mean = moved(sent, total / self.budget.clients)
        said = [cast(MetricRecord, reply.content["metrics"]).get(LOSS) for reply in usable]
        losses = [cast(float, loss) for loss in said if loss is not None]
        told = {LOSS: math.fsum(losses) / len(losses)} if losses else {}
        carriers = (usable if whole else usable[:1]) or [Message(RecordDict(), reply_to=requests[0])]
        record = wire.TensorRecord(mean)
        for carrier in carriers:
            carrier.content = RecordDict({"arrays": record, "metrics": MetricRecord({EXAMPLES: 1, **told})})
        return carriers

    def _noisy_sum(self, server_round: int, updates: Iterator[Tensor], numbers: int) -> Tensor:
        """The sum of updates with its noise, fp64 ``[numbers]``; an adaptive clip moves on."""
        budget, settings = self.budget, self.settings
        deviation = budget.noise_multiplier * self.clip
        draws = System() if self.seed is None else Seeded(derive_seed(self.seed, "privacy", server_round))
        if settings.noise == "clients":  # those who have answered have clipped their updates, and added their shares
            total, answered = clipped_sum(updates, math.inf, numbers)
            missing = max(budget.clients - len(answered), 0) / budget.clients
            return total + draws.normal((numbers,), deviation * math.sqrt(missing))
        total, inside = clipped_sum(updates, self.clip, numbers)
        if settings.quantile is None:
            return total + draws.normal((numbers,), deviation)
        multiplier, count = split_noise(budget.noise_multiplier, budget.clients)
        total += draws.normal((numbers,), multiplier * self.clip)
        noise = float(draws.normal((), count))
        self.clip = next_clip(self.clip, inside, budget.clients, settings.quantile, noise)
        return total

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart."""
        return {"clip": self.clip}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        self.clip = float(state["clip"])
