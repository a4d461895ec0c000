"""What several of these tests need: adapters to try, random states, messages and an engine that runs a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor
from transformers import PreTrainedModel

from fedlora.adapters import State
from fedlora.federation import Federation
from fedlora.grid import ClientGrid
from fedlora.model import AdaptedModel
from fedlora.tasks import Batch

TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

ADAPTERS = {
    "lora": ["method=fedit"],
    "ffa": ["method=ffa"],
    "fed_sb[weight]": ["method=fed_sb", "adapter.basis=weight"],
    "fed_sb[seeded]": ["method=fed_sb", "adapter.basis=seeded"],
    "fed_sb[gradient]": ["method=fed_sb", "adapter.basis=gradient"],
}
SCALES = {
    "alpha": ["adapter.rank=4", "adapter.alpha=6"],
    "rslora": ["adapter.rank=4", "adapter.alpha=6", "adapter.rslora=true"],
}
FACTORS = {"alpha": 6 / 4, "rslora": 6 / 4**0.5}
TARGETS = {
    "tiny_bert": "[query, intermediate.dense, output.dense]",
    "tiny_gpt2": "[c_attn, c_proj]",
    "tiny_llama": "[q_proj, k_proj]",
}


def of_architecture(architecture: str, folder: Path) -> list[str]:
    return [f"backbone.path={folder}", f"adapter.target_modules={TARGETS[architecture]}"]


def started(federation: Federation) -> AdaptedModel:
    """A model as the server starts it, gradient basis included."""
    model = federation.build_model()
    federation.initialise_on_server(model)
    return model


def bare_backbone(federation: Federation) -> PreTrainedModel:
    """The backbone with its task head and no adapter."""
    overrides = federation.task.model_overrides(federation.schema)
    return cast(
        PreTrainedModel, federation.backbone.load(federation.task.auto_class, federation.config.seed, **overrides)
    )


def random_state(model: AdaptedModel, keys: Iterable[str], seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in model.shapes(keys).items()}


def first_batch(federation: Federation, rows: int = 6) -> Batch:
    return federation.task.collate(federation.rows, range(rows))


def logits(module: torch.nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        return module(**{key: value for key, value in batch.items() if key != "target"}).logits


def request(node: int, arrays: ArrayRecord | None = None, **config: object) -> Message:
    """A train message as a strategy writes it."""
    content = RecordDict({"config": ConfigRecord({"server-round": 1, **config})})  # type: ignore[dict-item]
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content, node, MessageType.TRAIN)


def reply(to: Message, arrays: ArrayRecord | None, examples: int = 3, loss: float = 0.25) -> Message:
    content = RecordDict({"metrics": MetricRecord({"num-examples": examples, "train_loss": loss})})
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content, reply_to=to)


def echo(message: Message) -> Message:
    return reply(message, message.content.array_records["arrays"])


class Engine(ClientGrid):
    """An engine that answers with ``answer(request)``, the last client first, and remembers all messages."""

    def __init__(self, answer: Callable[[Message], Message] = echo) -> None:
        super().__init__()
        self.answer = answer
        self.requests: list[Message] = []
        self.answers: list[Message] = []

    def exchange(self, requests: list[Message], timeout: float | None) -> list[Message]:
        answers = [self.answer(message) for message in reversed(requests)]
        self.requests += requests
        self.answers += answers
        return answers


def serialised_bytes(message: Message) -> int:
    """Length of everything that Flower serialises for a message."""
    return sum(len(thing.deflate()) for thing in get_all_nested_objects(message).values())


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same keys in the same order, and the same bits."""
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key
