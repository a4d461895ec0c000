"""Causal language modelling of instruction data, with the loss on the answers only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, cast

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from fedlora.encoded import EncodedRows
from fedlora.errors import InputError
from fedlora.packed_attention import PickRows
from fedlora.tasks.base import IGNORED, Batch, Schema, Statistics, Task, TaskConfig, model_inputs, plain_text, register
from fedlora.tasks.chat import Dialogue, encode_dialogue


class CausalLMConfig(TaskConfig):
    """A language model's settings.

    Attributes:
        chat: whether a prompt and its completion go through the tokenizer's chat template, as one user and one
            assistant turn; ``auto``: if the tokenizer has one. Rows of ``data.messages`` always do.
        separator: what stands between prompt and completion where no chat template does.
        max_new_tokens: the longest answer that is generated.
    """

    chat: Literal["auto"] | bool = "auto"
    separator: str = " "
    max_new_tokens: int = Field(default=64, ge=1)


@register
class CausalLM(Task):
    """``data.text`` is the prompt and ``data.label`` the completion, or ``data.messages`` holds whole dialogues."""

    Config = CausalLMConfig
    name = "causal_lm"
    auto_class = AutoModelForCausalLM
    default_metric = "token_accuracy"
    columns = ("messages", "text", "label")
    nested = ("messages",)
    ends_answers: ClassVar[bool] = True
    """Whether an answer without a chat template closes with the end token."""

    @property
    def settings(self) -> CausalLMConfig:
        """The settings with their own type."""
        return cast(CausalLMConfig, self.config)

    def schema(self, rows: pd.DataFrame) -> Schema:
        """No labels to agree on; the backbone must be a decoder."""
        self.backbone.require_decoder(self.name)
        return Schema()

    def encode(self, rows: pd.DataFrame, schema: Schema, max_length: int) -> EncodedRows:
        """Token ids, and as labels the tokens of the answers (every other token is ignored).

        A prompt too long to leave room is cut from its left, so that the answer is kept.
        """
        pieces = self._dialogues(rows) if self._uses_chat(rows) else self._completions(rows)
        ids, labels, longer = [], [], set()
        for number, (tokens, answer) in zip(rows.index, pieces, strict=True):
            if not any(answer):
                raise InputError(
                    f"Row {number + 1} has no answer tokens to learn from (rows count from 1): its completion "
                    "(data.label, or the assistant turns of data.messages) is empty after the template."
                )
            cut = fit(answer, max_length)
            if len(tokens) > max_length:
                longer.add(number)
            ids.append(tokens[cut])
            labels.append([t if learn else IGNORED for t, learn in zip(tokens[cut], answer[cut], strict=True)])
        return EncodedRows.from_lists({"input_ids": ids, "labels": labels}, {}, truncated=len(longer))

    def _uses_chat(self, rows: pd.DataFrame) -> bool:
        if "messages" in rows:
            return True
        has_template = self.tokenizer.chat_template is not None
        return has_template if self.settings.chat == "auto" else self.settings.chat

    def _dialogues(self, rows: pd.DataFrame) -> list[tuple[list[int], list[bool]]]:
        dialogues: list[Dialogue]
        if "messages" in rows:
            dialogues = list(rows["messages"])
        else:
            turns = zip(plain_text(rows, "text"), plain_text(rows, "label"), strict=True)
            dialogues = [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for prompt, answer in turns
            ]
        return [encode_dialogue(self.tokenizer, *numbered) for numbered in zip(dialogues, rows.index, strict=True)]

    def _completions(self, rows: pd.DataFrame) -> list[tuple[list[int], list[bool]]]:
        end: Any = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        prompts: Any = self.tokenizer(plain_text(rows, "text"), add_special_tokens=True)["input_ids"]
        texts = [self.settings.separator + text if text.strip() else "" for text in plain_text(rows, "label")]
        answers: Any = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        pieces = []
        for prompt, answer in zip(prompts, answers, strict=True):
            start = prompt or end
            learned = answer + end if answer and self.ends_answers else answer
            pieces.append((start + learned, [False] * len(start) + [True] * len(learned)))
        return pieces

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of every row, summed over its answer tokens."""
        return answer_losses(model, batch)[0].sum(1)

    def row_weights(self, batch: Batch) -> Tensor:
        """The answer tokens of every row."""
        return (batch["labels"][:, 1:] != IGNORED).sum(1)

    def statistics(self, model: nn.Module, batch: Batch) -> Statistics:
        """Summed loss, answer tokens and correct tokens of every row."""
        loss, correct, learned = answer_losses(model, batch)
        return {
            "loss": loss.sum(1).double().cpu().numpy(),
            "tokens": learned.sum(1).cpu().numpy(),
            "correct": (correct & learned).sum(1).cpu().numpy(),
        }

    def metrics(self, statistics: Statistics) -> dict[str, float]:
        """Token accuracy, loss per answer token and its exponential."""
        tokens = float(statistics["tokens"].sum())
        loss = float(statistics["loss"].sum()) / tokens
        return {
            "token_accuracy": float(statistics["correct"].sum()) / tokens,
            "loss": loss,
            "perplexity": float(np.exp(min(loss, 700.0))),
        }

    def sample(self, model: nn.Module, rows: EncodedRows, row: int) -> dict[str, str] | None:
        """Continue the row's prompt (everything before its last answer) greedily."""
        prompt, reference = split_last_answer(rows.piece("input_ids", row), rows.piece("labels", row))
        answer = generate(model, self.tokenizer, [prompt], self.settings.max_new_tokens)[0]
        text = {"prompt": prompt, "reference": reference, "answer": answer}
        return {key: str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for key, ids in text.items()}


def fit(answer: list[bool], max_length: int) -> slice:
    """Which ``max_length`` tokens to keep: cut from the left, but never past the token before the first answer."""
    first = answer.index(True)
    start = max(0, min(len(answer) - max_length, first - 1))
    return slice(start, start + max_length)


def answer_losses(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hit and mask of every predicted position ``[b, t - 1]``; loss is zero where nothing is learned.

    The vocabulary is scored only where something is learned, unless the scoring layer itself is trained.
    """
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORED
    width = labels.shape[1]
    places = learned.flatten().nonzero()[:, 0]
    sources = places + places // width  # the same positions in [b, t]
    with _scored_at(model, sources) as cut:
        logits = model(**model_inputs(batch)).logits.float()
    places = places.to(logits.device)
    scores = logits.flatten(0, 1) if cut else logits[:, :-1].flatten(0, 1).index_select(0, places)
    truth = labels.flatten().to(logits.device).index_select(0, places)
    loss = scores.new_zeros(labels.numel()).index_copy(
        0, places, functional.cross_entropy(scores, truth, reduction="none")
    )
    hits = torch.zeros(labels.numel(), dtype=torch.bool, device=logits.device)
    hits = hits.index_copy(0, places, scores.argmax(-1) == truth)
    return loss.view_as(labels), hits.view_as(labels), learned


@contextmanager
def _scored_at(model: nn.Module, places: Tensor) -> Iterator[bool]:
    """Let the layer that scores the vocabulary see only the ``places`` of the flattened tokens ``[b, t]``.

    Yields whether it does: not where that layer is trained, because clients have scoring layers of their own then.
    """
    layer: nn.Module | None = cast(Any, model).get_output_embeddings()
    if layer is None or any(parameter.requires_grad for parameter in layer.parameters()):
        yield False
        return

    def cut(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (PickRows.apply(args[0].flatten(0, 1), places.to(args[0].device))[None], *args[1:])  # pyright: ignore

    handle = layer.register_forward_pre_hook(cut)
    try:
        yield True
    finally:
        handle.remove()


def split_last_answer(ids: np.ndarray, labels: np.ndarray) -> tuple[list[int], list[int]]:
    """A row's tokens before its last answer, and that answer."""
    learned = np.flatnonzero(labels != IGNORED)
    breaks = np.flatnonzero(np.diff(learned) > 1)
    start = int(learned[breaks[-1] + 1] if len(breaks) else learned[0])
    return ids[:start].tolist(), ids[start : learned[-1] + 1].tolist()


@torch.no_grad()
def generate(model: nn.Module, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy continuations of ``prompts``, up to and without the end token; batched with padding on the left."""
    width = max(len(prompt) for prompt in prompts)
    device = next(model.parameters()).device
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id or 0, device=device)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[i, width - len(prompt) :] = 1
    written = cast(Any, model).generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )[:, width:]
    return [row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
            for row in written.tolist()]  # fmt: skip
