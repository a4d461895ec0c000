"""Checks of everything that comes from the other end of a connection, before anything is made of it.

The server checks replies, a client checks what it is asked. A check raises :class:`~fedlora.errors.FedloraError` with a
reason; it costs that client its update, or is the answer to that message, and nothing else. Nothing is unpickled: an
array is a header and plain numbers, and any other way of storing one is refused by its name.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from fedlora import wire
from fedlora.config import Config
from fedlora.errors import FedloraError
from fedlora.protocol import CAPABILITY, CLIP, EPSILON, EXAMPLES, GRADIENTS, LOSS, NOISE

MAX_NAME = 1024
"""Characters of a name of a client or factor."""
MAX_HEADER = 1 << 20
"""Characters of the description of a base correction."""
MAX_ROUND = 10**6 - 1
MAX_REASON = 500
Kind = type[ArrayRecord] | type[MetricRecord] | type[ConfigRecord]
NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class ReplyRules:
    """What a run accepts of a client that has trained.

    Attributes:
        losses: whether it may say its loss; a client's policy may keep it.
        epsilons: whether it may say what it has released.
        unbounded_epsilon: whether that may be infinite, as it is without noise.
        max_examples: rows that it may say it has; ``None``: any number.
        max_update_norm: of what it changes in the tensors that it sends; ``None``: any.
    """

    losses: bool = True
    epsilons: bool = False
    unbounded_epsilon: bool = False
    max_examples: int | None = None
    max_update_norm: float | None = None

    @classmethod
    def of(cls, config: Config) -> ReplyRules:
        """The rules of a run."""
        privacy, cohort = config.privacy, config.cohort
        return cls(
            losses=privacy.send_losses,
            epsilons=privacy.name == "record",
            unbounded_epsilon=privacy.noise_multiplier == 0,
            max_examples=cohort.max_examples if privacy.send_counts else 1,
            max_update_norm=cohort.max_update_norm,
        )


# Both ends ------------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """What a stranger wrote as one line of at most ``MAX_REASON`` printable characters."""
    line = " ".join(text[: 4 * MAX_REASON].split())
    return "".join(char if char.isprintable() else "?" for char in line)[:MAX_REASON]


def content_of(message: Message, required: Mapping[str, Kind], optional: Mapping[str, Kind] = NONE) -> RecordDict:
    """The content of a message that holds exactly the records it should.

    Args:
        message: of a peer.
        required: kinds of the records that must be there, by name.
        optional: of those that may be.

    Raises:
        FedloraError: it holds no content, or a record is missing, unknown or of another kind.
    """
    if not message.has_content():
        raise FedloraError("it has no content")
    content, kinds = message.content, {**required, **optional}
    unknown = [name for name in content if name not in kinds]
    if unknown:
        raise FedloraError(f"it holds records {reprlib.repr(unknown)}, which nobody asked for")
    for name, kind in kinds.items():
        if name in content and not isinstance(content[name], kind):
            raise FedloraError(f"'{name}' is a {type(content[name]).__name__}, not a {kind.__name__}")
        if name in required and name not in content:
            raise FedloraError(f"it holds no '{name}' record")
    return content


def tensors(record: ArrayRecord, layout: wire.Layout, dtype: str = "fp32") -> dict[str, Tensor]:
    """The fp32 tensors of a packed record, all of whose numbers are finite.

    Raises:
        FedloraError: it is not one packed array of this type and size, or a number is not finite.
    """
    flat = wire.numbers(record, layout, dtype)
    state = wire.views(flat, layout)
    if not bool(flat.sum().isfinite()):  # or the numbers are only large
        broken = [key for key, value in state.items() if not bool(value.isfinite().all())]
        if broken:
            raise FedloraError(f"tensor '{broken[0]}' holds numbers that are not finite")
    return state


# The server -----------------------------------------------------------------------------------------------------------


def trained(
    reply: Message,
    rules: ReplyRules,
    layout: wire.Layout | None,
    dtype: str = "fp32",
    sent: Mapping[str, Tensor] = NONE,
) -> RecordDict:
    """What a client that has trained sent back: ``metrics``, and its tensors as ``arrays``, both checked.

    Args:
        reply: of the client, no error.
        rules: of the run.
        layout: names and shapes of its tensors; ``None``: it sends none.
        dtype: of its tensors on the wire.
        sent: the tensors that it was sent, where the norm of its update is bounded.

    Raises:
        FedloraError: it cannot be used.
    """
    arrays: dict[str, Kind] = {} if layout is None else {"arrays": ArrayRecord}
    content = content_of(reply, {"metrics": MetricRecord, **arrays})
    checked = RecordDict({"metrics": _metrics(content.metric_records["metrics"], rules)})
    if layout is not None:
        state = tensors(content.array_records["arrays"], layout, dtype)
        if rules.max_update_norm is not None:
            _require_norm(state, sent, rules.max_update_norm)
        checked["arrays"] = wire.TensorRecord(state)
    return checked


def gradients(reply: Message, layout: wire.Layout) -> dict[str, Tensor]:
    """The gradients that a client was asked for, ``{module: [m, n]}``.

    Raises:
        FedloraError: the reply cannot be used.
    """
    return tensors(content_of(reply, {"setup": ArrayRecord}).array_records["setup"], layout)


def announcement(reply: Message) -> ConfigRecord:
    """The record in which a client says what it is able to train; its values are checked by whoever reads them.

    Raises:
        FedloraError: there is no such record, or others beside it.
    """
    return content_of(reply, {CAPABILITY: ConfigRecord}).config_records[CAPABILITY]


def _metrics(record: MetricRecord, rules: ReplyRules) -> MetricRecord:
    """Refuse metrics other than those of the run, and values that cannot be what they say."""
    names = [EXAMPLES, *([LOSS] if rules.losses else []), *([EPSILON] if rules.epsilons else [])]
    unknown = [name for name in record if name not in names]
    if unknown:
        raise FedloraError(f"it holds metrics {reprlib.repr(unknown)}, which nobody asked for")
    examples, loss, epsilon = (record.get(name) for name in (EXAMPLES, LOSS, EPSILON))
    if not _is_whole(examples, 1, rules.max_examples or 1 << 53):
        most = "" if rules.max_examples is None else f" of at most {rules.max_examples}"
        raise FedloraError(f"{EXAMPLES} is {reprlib.repr(examples)}, not a positive integer{most}")
    if LOSS in record and not _is_finite(loss):
        raise FedloraError(f"{LOSS} is {reprlib.repr(loss)}, not a finite number")
    if EPSILON in record and not (_is_at_least_0(epsilon) or (rules.unbounded_epsilon and epsilon == math.inf)):
        raise FedloraError(f"{EPSILON} is {reprlib.repr(epsilon)}, not a finite number from 0")
    return record


def _require_norm(state: Mapping[str, Tensor], sent: Mapping[str, Tensor], largest: float) -> None:
    """Refuse an update whose norm over all tensors is too large; a tensor that was not sent counts as a whole."""
    changes = (value.double() - sent[key].double() if key in sent else value.double() for key, value in state.items())
    norm = math.sqrt(sum(float(change.square().sum()) for change in changes))
    if norm > largest:
        raise FedloraError(f"the norm of its update is {norm:.4g}, and cohort.max_update_norm = {largest:g}")


# A client -------------------------------------------------------------------------------------------------------------


def asks_for_gradients(message: Message) -> bool:
    """Whether a client is asked for gradients instead of training."""
    config = message.content.get("config") if message.has_content() else None
    return isinstance(config, ConfigRecord) and GRADIENTS in config


def instructions(message: Message, known: Collection[str]) -> dict[str, Any]:
    """What a client is asked to do, by a message of any kind.

    Args:
        message: of the server.
        known: the clients that there are here.

    Raises:
        FedloraError: it holds records or instructions that its kind does not have, or a value that none can have.
    """
    kind = message.metadata.message_type
    if kind not in (MessageType.TRAIN, MessageType.QUERY):  # "train.default" would reach the same code in Flower
        raise FedloraError(f"it is of type {reprlib.repr(kind)}, and this client knows 'train' and 'query'")
    question = kind == MessageType.QUERY
    trains = not question and not asks_for_gradients(message)
    optional: dict[str, Kind] = dict.fromkeys(("arrays", "setup", "correction"), ArrayRecord) if trains else {}
    content = content_of(message, {"config": ConfigRecord}, optional)
    asked: dict[str, Any] = dict(content.config_records["config"])
    allowed = {"server-round", "client-id", *(TRAINING if trains else () if question else (GRADIENTS,))}
    unknown = [name for name in asked if name not in allowed]
    if unknown:
        raise FedloraError(f"the strategy asks for {reprlib.repr(unknown)}, which this client does not do")
    if missing := {"server-round", "client-id"} - set(asked):
        raise FedloraError(f"the message does not say its {min(missing)}")
    for name, value in asked.items():
        wanted, fits = RULES[name]
        if not fits(value):
            raise FedloraError(f"'{name}' is {reprlib.repr(value)}, not {wanted}")
    if trains and asked["server-round"] < 1:
        raise FedloraError("'server-round' is 0, and training starts with round 1")
    if asked.get("basis", -1) >= asked["server-round"]:
        raise FedloraError(f"'basis' is {asked['basis']}, which is no round before this one")
    for one, other in ((CLIP, NOISE), (NOISE, CLIP)):
        if one in asked and other not in asked:
            raise FedloraError(f"it holds '{one}' without '{other}'")
    if ("correction" in asked) != ("correction" in content):
        raise FedloraError("a base correction and its description come together or not at all")
    strangers = [name for name in asked.get("pool") or (asked["client-id"],) if name not in known]
    if strangers:
        raise FedloraError(f"{reprlib.repr(strangers)} are no clients here")
    return asked


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most  # no bool, which is an int to Python


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_at_least_0(value: Any) -> bool:
    return _is_finite(value) and value >= 0


def _is_name(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= MAX_NAME


def _are_names(value: Any) -> bool:
    return type(value) is list and all(map(_is_name, value)) and len(set(value)) == len(value)


RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "server-round": ("the number of a round", lambda value: _is_whole(value, 0, MAX_ROUND)),
    "client-id": ("a name", _is_name),
    "pool": ("a list of different names", _are_names),
    "train": ("a list of different names", _are_names),
    "personal": ("true or false", lambda value: type(value) is bool),
    "restart": ("true or false", lambda value: type(value) is bool),
    "correction": ("a text", lambda value: type(value) is str and 0 < len(value) <= MAX_HEADER),
    "basis": ("the number of a round", lambda value: _is_whole(value, 0, MAX_ROUND)),
    CLIP: ("a positive finite number", lambda value: _is_at_least_0(value) and value > 0),
    NOISE: ("a finite number from 0", _is_at_least_0),
    GRADIENTS: ("true", lambda value: value is True),
}
TRAINING = tuple(name for name in RULES if name != GRADIENTS)
