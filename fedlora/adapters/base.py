"""The adapter seam: what is injected, which of its tensors are trained, how they start, and the update they make.

A method is one file with one subclass of :class:`Adapter` and one ``@register`` line. PEFT injects the layers and
names their tensors; the list of trained tensors is ours, because PEFT turns gradients of frozen ones back on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import Tensor

from fedlora.capability import Capability
from fedlora.config import Settings, nearest, validate
from fedlora.errors import FedloraError, InputError
from fedlora.lowrank import LowRank

State = dict[str, Tensor]
Choice = TypeVar("Choice")
InTurn = Annotated[list[Choice], Field(min_length=1)]
Drawn = Annotated[dict[Choice, Annotated[float, Field(gt=0)]], Field(min_length=1)]
Place = Literal["shared", "private", "round", "client", "frozen"]
"""Where a tensor of an adapter lives.

``shared``: trained, and travels. ``private``: trained, and never leaves the client. ``round``: trained anew in every
round, and folded into what travels at its end (:meth:`Adapter.settled`). ``client``: not trained, and each client has
its own, made from the seed (:meth:`Adapter.own_tensors`). ``frozen``: not trained, and the same everywhere.
"""
ADAPTER_NAME = "default"


class AdapterConfig(Settings):
    """Settings that every adapter has.

    Attributes:
        target_modules: the layers to adapt: ``attention``, ``all-linear``, a list of names, a suffix or a regular
            expression; ``None`` takes PEFT's defaults for the architecture.
        head: whether the task head travels (``shared``), stays at the client (``private``) or is not trained.
        client_modules: which of the adapted modules a client trains, by their last names (``query+value``, ``all``):
            in turn, or drawn with the given shares; ``None``: all clients train all of them.
    """

    name: str
    target_modules: list[str] | str | None
    head: Literal["shared", "private", "frozen"]
    client_modules: InTurn[str] | Drawn[str] | None = None


@dataclass(frozen=True)
class Affinity:
    """Whether dW is affine in what is trained, so that a plain average of states is exact.

    Attributes:
        affine: the answer.
        error: the measured deviation from an affine map; ``None`` where the answer follows from the formula of dW.
        reason: why it could not be measured (and ``affine`` is ``False``).
    """

    affine: bool
    error: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Phase:
    """A part of a client's round, in which some of what it trains is trained and the rest is at rest.

    Attributes:
        trains: what is private, what is not (it travels, or is folded into what does), or all that the client trains.
        loss: the mean loss of a batch, from the task, the model and the batch; ``None``: the task's own.
    """

    trains: Literal["private", "shared", "all"]
    loss: Callable[[Any, Any, Mapping[str, Tensor]], Tensor] | None = None

    def objective(self, task: Any) -> Callable[[Any, Mapping[str, Tensor]], Tensor]:
        """The mean loss of a batch, from the model and the batch."""
        return task.loss if self.loss is None else partial(self.loss, task)


class Adapter(ABC):
    """One adapter family. Subclasses say what is injected, what of it trains and how it starts.

    Attributes:
        clients: ids of all training clients, sorted; the federation writes them before a model is built.
        groups: the group of each of them, if the data says so (``data.group``); written together with them.
        ranked: names of the factors A ``[r, n]`` and B ``[m, r]`` whose inner dimension is the client's rank.
    """

    Config: ClassVar[type[AdapterConfig]] = AdapterConfig
    ranked: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")
    needs_clients: ClassVar[bool] = False
    """Whether what one client starts from depends on who the others are."""

    def __init__(self, config: AdapterConfig) -> None:
        self.config = config
        self.clients: tuple[str, ...] = ()
        self.groups: Mapping[str, str] = {}

    @property
    def label(self) -> str:
        """The name that tables print; it carries every choice that changes the numbers."""
        return self.config.name

    @property
    def broadcast_frozen(self) -> bool:
        """Whether the frozen tensors must be sent to every client once (setup bytes) instead of being seeded."""
        return False

    @property
    def disjoint(self) -> bool:
        """Whether clients train in subspaces of their own, which only some strategies can aggregate."""
        return False

    @property
    def client_ranks(self) -> list[int] | dict[int, float] | None:
        """Ranks of the clients where they differ; see :mod:`fedlora.ranks` and :mod:`fedlora.capability`."""
        return None

    @property
    def client_heads(self) -> list[int] | dict[int, float] | None:
        """How many of its heads clients train where they differ; see :mod:`fedlora.capability`."""
        return None

    @property
    def needs_public_sample(self) -> bool:
        """Whether :meth:`initialise` on the server needs gradients of a server-held public sample."""
        return False

    @property
    def needs_client_gradients(self) -> bool:
        """Whether :meth:`initialise` on the server needs the summed gradients of the clients of the first cohort."""
        return False

    @abstractmethod
    def peft_config(self) -> PeftConfig:
        """A new PEFT configuration that injects this adapter's layers."""

    def require(self, capability: Capability) -> None:  # noqa: B027  most adapters have neither rank nor heads to choose
        """Refuse what a client announces that this adapter cannot give it.

        Raises:
            FedloraError: its rank or number of heads is too large.
        """

    def parts(self, capability: Capability) -> tuple[str, ...]:
        """The factors that a client of ``capability`` trains if it is not told which; none: all."""
        return ()

    @abstractmethod
    def trains(self, key: str, tensor: Tensor) -> bool:
        """Whether the injected tensor ``key`` (``<module>.<name>``) is trained; the others are frozen."""

    def place(self, key: str, tensor: Tensor) -> Place:
        """Where the injected tensor ``key`` lives; by default everything trained is shared."""
        return "shared" if self.trains(key, tensor) else "frozen"

    def phases(self) -> tuple[Phase, ...]:
        """How a client trains in a round, in order, each phase on the same batches; by default all at once."""
        return (Phase("all"),)

    def has_turn(self, key: str, step: int) -> bool:
        """Whether the local step ``step`` of a round, from 0, trains the tensor ``key``; by default each trains all.

        What rests in a step gets neither gradient nor noise there, and its moments stay as they are.
        """
        return True

    @abstractmethod
    def check(self, layers: Mapping[str, BaseTunerLayer], tensors: Mapping[str, Tensor]) -> None:
        """Refuse layers that this adapter cannot serve; called once after injection, also on the meta device.

        Raises:
            InputError: a layer is of the wrong kind, or too small.
        """

    @abstractmethod
    def affinity(self, layers: Mapping[str, BaseTunerLayer]) -> Affinity:
        """Whether dW of ``layers`` is affine in the trained tensors."""

    def initialise(  # noqa: B027  an adapter that stays as it was injected has nothing to do
        self, layers: Mapping[str, Any], seed: int, gradients: State | None = None
    ) -> None:
        """Fill every injected tensor in place; by default they stay as the seeded injection made them.

        Args:
            layers: injected layers by module name.
            seed: the run's seed; each layer draws from its own stream.
            gradients: ``{module: [m, n]}`` summed loss gradients of the public sample or of clients, when asked for.
        """

    def drawn(self, layers: Mapping[str, Any], seed: int, server_round: int) -> State:
        """The frozen tensors that are new after ``server_round``, where they come from the seed alone.

        Raises:
            FedloraError: they do not, so they must be sent.
        """
        raise FedloraError(f"the strategy asks for new frozen tensors, and adapter {self.label} cannot draw them")

    def own_tensors(self, layers: Mapping[str, Any], seed: int, client: str) -> State:
        """What one training client starts from that is not the same everywhere: all tensors of place ``client``."""
        return {}

    def penalty_gradient(
        self, layers: Mapping[str, Any], seed: int, state: Mapping[str, Tensor], clients: Sequence[str]
    ) -> State:
        """The gradients of a penalty on the trained tensors that no data enter; by default there is none.

        They are added to the gradients of the loss after those were clipped (and, under differential privacy, have got
        their noise): a penalty is no secret, so it needs no noise and must not use up the norm that data may have.

        Args:
            layers: injected layers by module name.
            seed: the run's seed.
            state: what is trained, of several clients: ``{key: [clients, ...]}``.
            clients: their ids.

        Returns:
            ``{key: [clients, ...]}`` of the penalised keys.
        """
        return {}

    def settled(self, state: Mapping[str, Tensor]) -> State:
        """What a client has after a round, with everything of place ``round`` folded into what travels."""
        return dict(state)

    def delta(self, state: Mapping[str, Tensor]) -> dict[str, LowRank] | None:
        """dW of every adapted module from a full state (shared and frozen tensors).

        ``None`` means that there is no formula: :meth:`fedlora.model.AdaptedModel.delta` measures it.
        """
        return None


_REGISTRY: dict[str, type[Adapter]] = {}


def register(name: str) -> Any:
    """Class decorator: make an adapter available as ``adapter=<name>``."""

    def add(adapter: type[Adapter]) -> type[Adapter]:
        _REGISTRY[name] = adapter
        return adapter

    return add


def build_adapter(values: Mapping[str, Any]) -> Adapter:
    """Return the adapter named by ``values["name"]`` with its settings checked.

    Raises:
        InputError: the name is unknown, or a setting is unknown to this adapter or out of range.
    """
    name = str(values.get("name"))
    if name not in _REGISTRY:
        raise InputError(f"adapter.name = '{name}' is not known.{nearest(name, _REGISTRY)} Known: {sorted(_REGISTRY)}.")
    adapter = _REGISTRY[name]
    return adapter(validate(adapter.Config, values, "adapter"))


def registered() -> dict[str, type[Adapter]]:
    """All registered adapters by name."""
    return dict(sorted(_REGISTRY.items()))
