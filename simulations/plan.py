"""What a run will send, hold and compute, before anything runs.

The plan runs the real sampler and the real strategy on the meta device, so that its bytes are the ledger's bytes
when no client fails. It reads the data (for the client index and the row lengths) but no weights.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import yaml
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora import wire
from fedlora.adapters import State, registered
from fedlora.capability import announcement
from fedlora.config import Config
from fedlora.federation import Federation
from fedlora.grid import node_of, parts_of
from fedlora.ledger import TOTALS
from fedlora.model import AdaptedModel
from fedlora.personal.model import PersonalModel
from fedlora.personal.work import flops_per_token
from fedlora.plugins import load_object
from fedlora.privacy.outlook import record_privacy
from fedlora.protocol import CAPABILITY, EPSILON, GRADIENTS
from fedlora.ranks import crop
from fedlora.training import steps_for
from fedlora.transport import Traffic, transport_bytes
from simulations.client_privacy import client_level
from simulations.compose import CONF, choices_of, options, own_pair
from simulations.finish import label
from simulations.memory import predicted_peak, step_bytes, weight_bytes
from simulations.sampler import NOBODY, cohort
from strategies.base import FederatedStrategy, Outgoing, Reply, Server
from strategies.build import build_strategy
from strategies.means import completed, weights

FP32 = 4


def plan_run(config: Config, federation: Federation | None = None) -> dict[str, Any]:
    """Return the plan of one run: parameters and bytes per client and round, per run, memory and work.

    ``upload_params``, ``download_params`` are per client and round (the mean where rounds differ), ``setup_params``
    once per client (again whenever the strategy changes them); ``total_bytes`` is every message of the run,
    ``total_transport_bytes`` what they cost on the clients' sockets (:mod:`fedlora.transport`, over TLS).

    Args:
        config: of the run.
        federation: of that configuration, with other rows than those that it names.

    Raises:
        InputError: as the run itself would.
    """
    federation = federation or Federation(config)
    model = federation.build_meta_model()
    strategy = build_strategy(config.strategy, model)
    private = client_level(federation, model, strategy)
    ours = strategy if isinstance(strategy, FederatedStrategy) else None
    rounds = config.rounds if ours is None or ours.trains else 0
    planned = record_privacy(federation) if config.privacy.name == "record" and rounds else None
    trainable = _trainable(federation, model)
    traffic = _traffic(federation, model, ours, rounds, {} if private is None else private.instructions())
    messages = max(traffic["clients"], 1)
    setup = sum(prod(s) for s in model.shapes(model.frozen).values()) if traffic["setup_bytes"] else 0
    communicates = ours is None or ours.communicates
    weights_held, step = weight_bytes(federation, model), step_bytes(federation, model)
    itemsize = wire.DTYPES[config.wire.dtype].itemsize
    return {
        "method": config.method,
        "label": label(config, federation.adapter, bool(rounds)),
        "rounds": rounds,
        "clients_per_round": traffic["clients"] / max(rounds, 1),
        "affine": model.affinity.affine,
        "trainable_params": trainable if rounds else 0,
        "upload_params": round(traffic["payload_up"] / messages / itemsize) if communicates else 0,
        "download_params": round(traffic["params_down"] / messages) if communicates else 0,
        "setup_params": setup,
        "payload_up_per_client": traffic["payload_up"] / messages,
        "payload_down_per_client": traffic["payload_down"] / messages,
        "setup_bytes_per_client": setup * FP32,
        "message_bytes_per_client_round": (traffic["message_up"] + traffic["message_down"]) / messages,
        "transport_bytes_per_client_round": (traffic["transport_up"] + traffic["transport_down"]) / messages,
        **{key: traffic[key] for key in TOTALS},
        "total_bytes": traffic["message_up"] + traffic["message_down"],
        "total_transport_bytes": traffic["transport_up"] + traffic["transport_down"],
        "per_round": traffic["per_round"],
        "client_memory_bytes": weights_held + step,
        "run_memory_bytes": predicted_peak(federation, model, weights_held, step),
        "privacy": private.summary() if private is not None else planned,
        "client_flops_per_round": _client_flops(federation, model) if rounds else 0,
    }


def _traffic(
    federation: Federation,
    model: AdaptedModel,
    ours: FederatedStrategy | None,
    rounds: int,
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Payload, setup, message and transport bytes of every round, from the real sampler and strategy on meta tensors.

    ``more``: instructions to every client beside those of the strategy.
    """
    config = federation.config
    shared: State = {key: torch.empty(s, device="meta") for key, s in model.shapes(model.shared).items()}
    setup = sum(prod(s) for s in model.shapes(model.frozen).values()) * FP32
    itemsize = wire.DTYPES[config.wire.dtype].itemsize
    delivered: set[str] = set()
    met: set[str] = set()
    sends_frozen = federation.adapter.broadcast_frozen
    per_round: list[dict[str, int]] = []
    total: dict[str, int] = defaultdict(int)
    counted = ours is None or ours.communicates
    metrics = {"train_loss": config.privacy.send_losses, EPSILON: config.privacy.name == "record"}
    reported = tuple(name for name, sent in metrics.items() if sent)
    if ours is not None:
        frozen = {key: torch.empty(s, device="meta") for key, s in model.shapes(model.frozen).items()}
        ours.begin_run(Server(frozen, lambda state: federation.public_gradients(model), federation.capability))
    if counted and rounds and federation.adapter.needs_client_gradients:
        size = sum(prod(shape) for shape in model.weight_shapes.values()) * FP32
        for client in cohort(config, federation.clients, 1):
            total["setup_bytes"] += size
            asked = _down(node_of(client), client, 0, "fp32", 0, 0, 0, None, ((GRADIENTS, True),))
            _count(total, asked, _reply(node_of(client), RecordDict({"setup": _blank("fp32", size)})))
    for server_round in range(1, rounds + 1):
        chosen = cohort(config, federation.clients, server_round)
        chosen = chosen if counted or not config.cohort.spares else chosen[: config.cohort.size]
        counted_rows = config.privacy.send_counts
        examples = [len(federation.index.train[client]) if counted_rows else 1 for client in chosen]
        sums: dict[str, int] = defaultdict(int)
        replies = []
        for client, count, share in zip(chosen, examples, weights(examples, "examples"), strict=True):
            capability = federation.capability(client)
            if federation.differences and client not in met:
                met.add(client)
                said = RecordDict({CAPABILITY: ConfigRecord(announcement(capability))})
                asked = _query(node_of(client), client, server_round)
                _count(sums, asked, _reply(node_of(client), said, MessageType.QUERY))
            out = ours.send(client, server_round, shared) if counted and ours is not None else Outgoing(shared)
            layout = model.answer_layout(capability, parts_of(out.instructions))
            sent = crop(out.state, model.layout(capability.rank))
            answer = crop({key: shared[key] for key in layout}, layout)
            correction = out.correction.tensors() if out.correction is not None else {}
            header = out.correction.header() if out.correction is not None else None
            down = _numbers(sent) * itemsize
            extra = _numbers(correction) * FP32
            once = setup if sends_frozen and client not in delivered else 0
            delivered.add(client)
            up = _numbers(answer) * itemsize
            sums["payload_down"] += down + extra
            sums["params_down"] += _numbers(sent) + _numbers(correction)
            sums["setup_bytes"] += once
            sums["payload_up"] += up
            sent_down = _down(
                node_of(client), client, server_round, config.wire.dtype, down, extra, once, header,
                _hashable({**more, **out.instructions}),
            )  # fmt: skip
            _count(sums, sent_down, _up(node_of(client), count, config.wire.dtype, up, reported))
            replies.append(Reply(client, completed(answer, shared), count, share, 0.0, frozenset(answer)))
        enough = config.cohort.size if config.cohort.spares else None
        if ours is not None and enough is not None:
            for client in chosen[enough:]:
                ours.failed(client)  # a spare that nobody needs
        replies = replies[:enough]
        if not chosen:
            if ours is not None:
                ours.send(NOBODY, server_round, shared)
            replies = [Reply(NOBODY, shared, 1, 1.0, 0.0)]
        if not counted:
            sums = defaultdict(int)
        elif ours is not None:
            shared = ours.fold(server_round, shared, replies)
            if ours.frozen() and ours.frozen_travels:
                sends_frozen = True
                delivered.clear()
        total["clients"] += len(chosen)
        for key, value in sums.items():
            total[key] += value
        per_round.append({"round": server_round, **{key: sums[key] for key in TOTALS}})
    return defaultdict(int, total) | {"per_round": per_round}  # type: ignore[return-value]


def _numbers(state: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


def _hashable(instructions: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in instructions.items())


class _Sent(NamedTuple):
    """Length of a message, and what it causes on the client's socket."""

    message: int
    transport: Traffic


def _count(sums: dict[str, int], request: _Sent, reply: _Sent) -> None:
    sums["message_down"] += request.message
    sums["message_up"] += reply.message
    sums["transport_down"] += request.transport.down + reply.transport.down
    sums["transport_up"] += request.transport.up + reply.transport.up


@lru_cache(maxsize=4096)
def _down(
    node: int, client: str, server_round: int, dtype: str, arrays: int, correction: int, setup: int, header: str | None,
    more: tuple[tuple[str, Any], ...],
) -> _Sent:  # fmt: skip
    """The size of the message to a client, from a message with as many bytes."""
    content = RecordDict({"arrays": _blank(dtype, arrays)} if arrays else {})
    instructions: dict[str, Any] = {"server-round": server_round}
    instructions |= {key: list(value) if isinstance(value, tuple) else value for key, value in more}
    if header is not None:
        content["correction"] = _blank("fp32", correction)
        instructions["correction"] = header
    content["config"] = ConfigRecord({**instructions, "client-id": client})
    if setup:
        content["setup"] = _blank("fp32", setup)
    return _sent(_request(content, node), "down")


@lru_cache(maxsize=4096)
def _up(node: int, examples: int, dtype: str, arrays: int, said: tuple[str, ...]) -> _Sent:
    """The size of the reply of a client that trained, with these metrics beside its number of examples."""
    metrics = MetricRecord({"num-examples": examples, **dict.fromkeys(said, 0.5)})
    return _reply(node, RecordDict({"metrics": metrics, "arrays": _blank(dtype, arrays)}))


def _query(node: int, client: str, server_round: int) -> _Sent:
    """The size of the question what a client is able to train."""
    config = ConfigRecord({"server-round": server_round, "client-id": client})
    return _sent(_request(RecordDict({"config": config}), node, MessageType.QUERY), "down")


def _reply(node: int, content: RecordDict, kind: str = MessageType.TRAIN) -> _Sent:
    """The size of a reply."""
    request = _request(RecordDict({"config": ConfigRecord()}), node, kind)
    request.metadata.__dict__["_message_id"] = "0" * 64
    return _sent(Message(content, reply_to=request), "up")


def _sent(message: Message, direction: Literal["down", "up"]) -> _Sent:
    return _Sent(wire.message_bytes(message), transport_bytes(message, direction))


def _request(content: RecordDict, node: int, kind: str = MessageType.TRAIN) -> Message:
    if TaskIdentity._run_id is None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    return Message(content, node, kind)


def _blank(dtype: str, size: int) -> ArrayRecord:
    array = wire.pack({}, dtype)[wire.PACKED]
    shape = (size // wire.DTYPES[dtype].itemsize,)
    return ArrayRecord({wire.PACKED: Array(dtype=array.dtype, shape=shape, stype=array.stype, data=bytes(size))})


def _trainable(federation: Federation, model: AdaptedModel) -> int:
    """Trained parameters of a client, on average where clients have different models."""
    sizes = {key: prod(shape) for key, shape in model.shapes(model.trainable).items()}
    kinds = Counter(federation.capability(client) for client in federation.clients)
    held = sum(count * sum(model.held(sizes, kind).values()) for kind, count in kinds.items())
    return round(held / kinds.total())


def _client_flops(federation: Federation, model: AdaptedModel) -> float:
    """Mean work of a client in a round.

    In each phase 4 FLOPs a token and matrix weight of a frozen backbone (forward, and backward to inputs only); counted
    operation by operation for clients that have models of their own.
    """
    settings = federation.config.client
    matrices = sum(
        int(layer.weight.numel()) for layer in model.module.modules() if isinstance(layer, nn.Linear | Conv1D)
    )
    train = federation.index.train
    own: dict[str, float] = {}
    if isinstance(model, PersonalModel):
        rows = np.concatenate(list(train.values()))
        middle = rows[np.argsort(federation.rows.lengths(rows), kind="stable")][len(rows) // 2 :][:2]
        own = flops_per_token(model, federation.task, federation.rows, middle)
    work = 0.0
    for client, rows in train.items():
        each = own[str(federation.capability(client).model)] if own else 4.0 * matrices * len(model.phases)
        whole = settings.batch_size * settings.grad_accumulation
        steps = steps_for(len(rows), whole, settings.local_epochs, settings.local_steps)
        visits = steps * min(whole, len(rows)) if settings.local_steps else settings.local_epochs * len(rows)
        work += each * float(federation.rows.lengths(rows).mean()) * visits
    return work / len(train)


def list_methods() -> list[dict[str, Any]]:
    """Every method of ``conf/method``: adapter, strategy, exactness, learning rate and its description."""
    return [_method(name) for name in options("method")]


def _method(name: str) -> dict[str, Any]:
    path = CONF / "method" / f"{name}.yaml"
    text = path.read_text()
    values = yaml.safe_load(text)
    choices = choices_of(name)
    target = load_object(own_pair(name)[1], "strategy._target_")
    comments: Sequence[str] = [line[2:] for line in text.splitlines() if line.startswith("# ")]
    return {
        "method": name,
        "adapter": choices["adapter"],
        "strategy": choices["strategy"],
        "exact": target.exact,
        "affine": getattr(registered()[choices["adapter"]], "affine", None),
        "lr": float(values["client"]["lr"]),
        "description": comments[2],
    }
