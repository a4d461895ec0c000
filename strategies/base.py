"""The strategy seam: a Flower Strategy in which a method is two small functions.

``send`` says what client k gets this round, ``fold`` how the replies become the next global state. Everything else
(messages, weights, records, checkpoints) is done here, so that a new method is about fifteen lines.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedlora import wire
from fedlora.adapters import State
from fedlora.adapters.lora import Lora
from fedlora.capability import Capability
from fedlora.correction import CorrectionUpdate
from fedlora.errors import InputError
from fedlora.grid import ClientGrid
from fedlora.lowrank import LowRank
from fedlora.model import AdaptedModel
from strategies.means import completed, exact_mean, weights


@dataclass(frozen=True)
class Reply:
    """What one client sent back.

    Attributes:
        client: client id.
        state: its shared tensors after training, fp32; what it did not train is as it was sent.
        examples: rows it trained on.
        weight: its share p_k of the aggregate; the weights of a round sum to 1.
        loss: its mean training loss; not a number where it keeps that for itself.
        trained: the keys of ``state`` that it trained and sent; ``None``: all.
    """

    client: str
    state: State
    examples: int
    weight: float
    loss: float
    trained: frozenset[str] | None = None


@dataclass(frozen=True)
class Outgoing:
    """What one client gets.

    Attributes:
        state: shared tensors to start from; empty for strategies that send none.
        correction: what brings the client's base up to date, or ``None``.
        instructions: further keys for the client: ``train``, the names of the factors that it trains and sends back
            (such as ``["lora_B"]``; the head always is), ``restart``, ``personal``, ``pool``, ``basis`` (the round
            after which the frozen tensors to be drawn were new).
    """

    state: Mapping[str, Tensor]
    correction: CorrectionUpdate | None = None
    instructions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Server:
    """What the server of a run has beside the model, for strategies that need it.

    Attributes:
        frozen: the frozen tensors as they are when the run starts or is resumed.
        gradients: ``gradients(state)`` gives the summed loss gradients ``{module: [m, n]}`` of the public sample at the
            global model: these shared tensors, and the strategy's base correction as it is then. Shapes only in a plan.
        capability: what a client is able to train.
    """

    frozen: State
    gradients: Callable[[State], State]
    capability: Callable[[str], Capability]


class FederatedStrategy(Strategy):
    """Base of every strategy of ours, and of a user's.

    Attributes:
        exact: the aggregate's dW equals the weighted mean of the clients' dW; ``None`` where there is no aggregate.
        own_subspaces: whether clients may train in subspaces of their own (``adapter.subspace=disjoint`` or ``split``).
        frozen_travels: whether clients are sent what :meth:`frozen` returns; if not, they make it themselves, as an
            instruction of :meth:`send` tells them.
        restarts: whether clients start from new factors in every round or every few, so that kept moments mean nothing.
        communicates: whether messages are counted (``local`` and ``central`` send nothing in reality).
        trains: whether there are rounds at all.
        evaluation: which model is evaluated: the one ``global`` model, each client's ``personal`` one, or the answer
            that needs no training (``zero_shot``).
        client_ranks: whether clients may have LoRA factors of different rank (``adapter.client_ranks``); their replies
            then hold factors of that rank.
        client_heads: whether clients may train different heads (``adapter.client_heads``).
        over_trainers: whether each tensor's mean is one over the clients that trained it (:func:`mean_of_trainers`),
            and not over all clients, of which some leave it as it was sent.
    """

    exact: ClassVar[bool | None] = False
    communicates: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    evaluation: ClassVar[Literal["global", "personal", "zero_shot"]] = "global"
    client_ranks: ClassVar[bool] = False
    client_heads: ClassVar[bool] = False
    over_trainers: ClassVar[bool] = False
    own_subspaces: ClassVar[bool] = False
    frozen_travels: bool = True
    restarts: bool = False

    def __init__(self, weighting: Literal["examples", "uniform"] = "examples") -> None:
        if weighting not in ("examples", "uniform"):
            raise InputError(f"strategy.weighting = {weighting!r} is not valid: use 'examples' or 'uniform'.")
        self.weighting = weighting
        self._state: State = {}
        self._asked: dict[int, str] = {}
        self._corrections: dict[tuple[tuple[str, int], ...], ArrayRecord] = {}

    # What a method implements ------------------------------------------------------------------------------------

    def prepare(self, model: AdaptedModel) -> None:
        """Look at the model once before the first round (on the meta device when planning).

        Raises:
            InputError: the strategy cannot aggregate this adapter.
        """

    def begin_run(self, server: Server) -> None:
        """Called once before the first round that is run, also after a resume."""

    def send(self, client: str, server_round: int, state: State) -> Outgoing:
        """What ``client`` gets this round; by default the global state."""
        return Outgoing(state)

    @abstractmethod
    def fold(self, server_round: int, state: State, replies: Sequence[Reply]) -> State:
        """Return the next global state from this round's replies (at least one), in cohort order.

        Args:
            server_round: the round, from 1.
            state: the global state that was sent.
            replies: what came back; failed clients are not among them.
        """

    def shares(self, clients: Sequence[str], examples: Sequence[int]) -> list[float]:
        """What each client's dW counts in the aggregate's: dW = sum_k p_k dW_k; by default the weights of a mean."""
        return weights(examples, self.weighting)

    def failed(self, client: str) -> None:
        """Called for a client that was addressed and did not answer with a usable reply."""

    def frozen(self) -> State:
        """The frozen tensors that the last :meth:`fold` changed (all of them, or none).

        Every client gets them, as setup, with its next message (:attr:`frozen_travels`); the base of a strategy changes
        none.
        """
        return {}

    def residual(self) -> dict[str, LowRank]:
        """The part of the last aggregate's dW that went into the base instead of the state (FedEx)."""
        return {}

    def base_correction(self) -> dict[str, Tensor]:
        """The sum of all residuals, dense ``{module: [m, n]}``, that belongs to the current global state."""
        return {}

    def keepsakes(self) -> dict[str, State]:
        """What a finished run keeps beside its adapter, ``{file name: tensors}``; by default nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Whatever must survive a restart: tensors, numbers, strings, and dictionaries and lists of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`."""

    # Flower's Strategy -------------------------------------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One message for every client of the cohort."""
        grid = cast(ClientGrid, grid)
        self.begin(arrays)
        clients = [grid.client_of(node) for node in grid.get_node_ids()]
        return [self._message(client, server_round, arrays, config, grid) for client in clients]

    def begin(self, arrays: ArrayRecord) -> None:
        """Start a round from the global state."""
        self._state = {key: tensor.clone() for key, tensor in wire.from_record(arrays).items()}
        self._asked = {}
        self._corrections = {}

    def _message(
        self, client: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: ClientGrid
    ) -> Message:
        outgoing = self.send(client, server_round, self._state)
        content = RecordDict()
        if outgoing.state:
            content["arrays"] = arrays if outgoing.state is self._state else wire.to_record(outgoing.state)
        instructions = {**config, "server-round": server_round, **outgoing.instructions}
        if outgoing.correction is not None:
            content["correction"] = self._record_of(outgoing.correction)
            instructions["correction"] = outgoing.correction.header()
        content["config"] = ConfigRecord(instructions)
        node = grid.address(client)
        self._asked[node] = client
        return Message(content, node, MessageType.TRAIN)

    def _record_of(self, correction: CorrectionUpdate) -> ArrayRecord:
        """The arrays of a correction: one record for all clients of a round that get the very same tensors."""
        tensors = correction.tensors()
        key = tuple((name, id(tensor)) for name, tensor in tensors.items())
        if key not in self._corrections:
            self._corrections[key] = wire.TensorRecord(tensors)  # holds them, so that no other gets their id
        return self._corrections[key]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Fold the usable replies; with none, the global state stays as it is."""
        usable = self.replies(replies)
        for client in set(self._asked.values()) - {reply.client for reply in usable}:
            self.failed(client)
        if not usable:
            return None, None
        state = self.fold(server_round, self._state, usable)
        told = [reply for reply in usable if not math.isnan(reply.loss)]  # a client may keep its loss
        loss = sum(reply.weight * reply.loss for reply in told)
        if 0 < len(told) < len(usable):
            loss /= sum(reply.weight for reply in told)
        metrics = MetricRecord({"train_loss": loss} if told else {})
        return wire.to_record(state) if state else None, metrics

    def replies(self, messages: Iterable[Message]) -> list[Reply]:
        """Usable messages as :class:`Reply`, with weights by examples or uniform."""
        contents = [(message, message.content) for message in messages if not message.has_error()]
        metrics = [cast(MetricRecord, content["metrics"]) for _, content in contents]
        examples = [int(cast(int, record["num-examples"])) for record in metrics]
        shares = weights(examples, self.weighting)
        return [
            Reply(
                client=self._asked[message.metadata.src_node_id],
                state=self._received(content),
                examples=count,
                weight=share,
                loss=float(cast(float, record.get("train_loss", math.nan))),
                trained=frozenset(content["arrays"]) if "arrays" in content else None,
            )
            for (message, content), record, count, share in zip(contents, metrics, examples, shares, strict=True)
        ]

    def _received(self, content: RecordDict) -> State:
        """What a client sent; where it trained a part of it, the rest as it was sent to it."""
        if "arrays" not in content:
            return {}
        return completed(wire.from_record(cast(ArrayRecord, content["arrays"])), self._state)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """No messages: the engine evaluates."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to aggregate."""
        return None

    def summary(self) -> None:
        """Nothing to log: the run folder says it all."""


def weighted_mean(replies: Sequence[Reply], keys: Iterable[str] | None = None) -> State:
    """sum_k p_k theta_k of every shared tensor, or of ``keys``, summed in cohort order in fp64 and rounded once."""
    keys = list(replies[0].state if keys is None else keys)
    mean = exact_mean([reply.state for reply in replies], [reply.weight for reply in replies], keys)
    return {key: value.to(replies[0].state[key].dtype) for key, value in mean.items()}


def require_lora(model: AdaptedModel, strategy: str, why: str) -> Lora:
    """The model's adapter, if it is LoRA with both factors trained.

    Raises:
        InputError: it is another one.
    """
    adapter = model.adapter
    if type(adapter) is not Lora:  # FFA-LoRA is a Lora too, with one trained factor
        raise InputError(
            f"strategy={strategy} needs adapter=lora, not {adapter.label}: {why}. "
            "For an affine adapter strategy=average is already exact."
        )
    return cast(Lora, adapter)
