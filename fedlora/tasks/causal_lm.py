"""Causal language modelling of prompt and completion, with the loss on the completion only."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fedlora.errors import InputError
from fedlora.tasks.base import Batch, Schema, Statistics, Task, register
from fedlora.tokens import TokenisedRows


@register
class CausalLM(Task):
    """``data.text`` is the prompt, ``data.label`` the completion; the prompt carries no loss."""

    name = "causal_lm"
    auto_class = AutoModelForCausalLM
    main_metric = "token_accuracy"

    def schema(self, rows: pd.DataFrame) -> Schema:
        """No labels to agree on."""
        return Schema()

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, rows: pd.DataFrame, schema: Schema, max_length: int
    ) -> TokenisedRows:
        """Prompt, completion and the end-of-text token; the target is where the completion starts.

        A prompt too long to leave room is cut from its left, so that the completion is kept.
        """
        end: Any = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        prompts: Any = tokenizer(rows["text"].tolist(), add_special_tokens=True)["input_ids"]
        answers: Any = tokenizer(rows["label"].astype(str).tolist(), add_special_tokens=False)["input_ids"]
        ids, starts, truncated = [], [], 0
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            if not answer:
                raise InputError(f"Row {number} has an empty completion (data.label): there is no token to learn.")
            answer = (answer + end)[: max_length - 1]
            room = max(max_length - len(answer), 1)
            truncated += len(prompt) > room
            prompt = prompt[-room:] or end
            ids.append(prompt + answer)
            starts.append(len(prompt))
        return TokenisedRows.from_lists(ids, starts, None, truncated)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the completion tokens of the batch."""
        loss, _, mask = _completion(model, batch)
        return loss.sum() / mask.sum()

    def weight(self, batch: Batch) -> int:
        """The completion tokens of the batch."""
        return int(_completion_mask(batch).sum())

    def statistics(self, model: nn.Module, batch: Batch) -> Statistics:
        """Summed loss, completion tokens and correct tokens of every row."""
        loss, correct, mask = _completion(model, batch)
        return {
            "loss": loss.sum(1).double().cpu().numpy(),
            "tokens": mask.sum(1).cpu().numpy(),
            "correct": (correct & mask).sum(1).cpu().numpy(),
        }

    def metrics(self, statistics: Statistics) -> dict[str, float]:
        """Token accuracy, loss per completion token and its exponential."""
        tokens = float(statistics["tokens"].sum())
        loss = float(statistics["loss"].sum()) / tokens
        return {
            "token_accuracy": float(statistics["correct"].sum()) / tokens,
            "loss": loss,
            "perplexity": float(np.exp(min(loss, 700.0))),
        }


def _completion(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, hit and mask of every predicted position ``[b, t - 1]``; loss is zero outside the completion."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    following = batch["input_ids"][:, 1:]
    mask = _completion_mask(batch)
    loss = functional.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view_as(following)
    return loss * mask, logits.argmax(-1) == following, mask


def _completion_mask(batch: Batch) -> Tensor:
    """Which predicted positions belong to the completion ``[b, t - 1]``."""
    mask = batch["attention_mask"][:, 1:] == 1
    position = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (position >= batch["target"][:, None]) & mask
