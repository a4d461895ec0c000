"""Multiple choice by likelihood: the language model answers with the choice that it finds most likely."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fedlora.encoded import EncodedRows
from fedlora.errors import InputError
from fedlora.tasks.base import IGNORED, Batch, Schema, Statistics, TaskConfig, plain_text, register
from fedlora.tasks.causal_lm import CausalLM, answer_losses
from fedlora.tasks.choices import resolve

PER_CHOICE = ("input_ids", "attention_mask", "labels")


class MultipleChoiceConfig(TaskConfig):
    """Multiple choice's settings.

    Attributes:
        chat: whether prompt and choice go through the tokenizer's chat template, as one user and one assistant turn;
            ``auto``: if the tokenizer has one.
        separator: what stands between prompt and choice where no chat template does.
    """

    chat: Literal["auto"] | bool = False
    separator: str = " "


@register
class MultipleChoice(CausalLM):
    """``data.text`` is the question, ``data.choices`` its possible answers, ``data.label`` says which is right.

    Training maximises the likelihood of the right choice after the question, evaluation compares all choices, as the
    Language Model Evaluation Harness does (Gao et al. 2021; Brown et al. 2020, section 2.4).
    """

    Config = MultipleChoiceConfig
    name = "multiple_choice"
    default_metric = "accuracy"
    columns = ("text", "choices", "label")
    nested = ("choices",)
    ends_answers = False

    def schema(self, rows: pd.DataFrame) -> Schema:
        """No labels to agree on.

        Raises:
            InputError: the backbone is no decoder, there are no choices, or a label is none of its row's choices.
        """
        if "choices" not in rows:
            raise InputError(
                "task=multiple_choice needs the possible answers: set data.choices to a column of lists, or to a list "
                "of columns such as data.choices=[a,b,c,d]."
            )
        resolve(rows)
        return super().schema(rows)

    def encode(self, rows: pd.DataFrame, schema: Schema, max_length: int) -> EncodedRows:
        """Every row holds the tokens of all its choices, one after the other, each with the prompt before it.

        Ragged: ``input_ids``, ``labels`` (the tokens of the choice) and ``choice`` (its number). Fixed: ``target``, the
        number of the right choice, and ``characters [rows, most choices]``, the length of each choice's text.
        """
        resolved = resolve(rows)
        counts = np.array([len(choices) for choices, _ in resolved])
        owner = np.repeat(np.arange(len(rows)), counts)
        number = np.concatenate([np.arange(count) for count in counts])
        texts = [choice for choices, _ in resolved for choice in choices]
        prompts = plain_text(rows, "text")
        pairs = pd.DataFrame({"text": [prompts[row] for row in owner], "label": texts}, index=owner)
        encoded = super().encode(pairs, schema, max_length)
        lengths = encoded.lengths(np.arange(len(encoded)))
        characters = np.ones((len(rows), counts.max()), dtype=np.int64)
        characters[owner, number] = [len(text) for text in texts]
        fixed = {"target": np.array([right for _, right in resolved]), "characters": characters}
        ragged = {**encoded.ragged, "choice": np.repeat(number, lengths).astype(np.int32)}
        first = np.concatenate([[0], np.cumsum(counts)])
        return EncodedRows(encoded.offsets[first], ragged, fixed, encoded.truncated)

    def collate(self, rows: EncodedRows, numbers: Any) -> Batch:
        """``input_ids``, ``attention_mask`` and ``labels`` ``[b, choices, t]``, ``target [b]``, ``characters``.

        A row with fewer choices than others has empty ones: no token, no label.
        """
        chosen = np.asarray(numbers, dtype=np.int64)
        numbered = [rows.piece("choice", row) for row in chosen]
        counts = [np.bincount(choice) for choice in numbered]
        most, longest = max(len(count) for count in counts), max(int(count.max()) for count in counts)
        shape = (len(chosen), most, longest)
        ids, labels = np.full(shape, self.backbone.pad_id), np.full(shape, IGNORED)
        mask = np.zeros(shape, dtype=np.int64)
        for place, (row, choice, count) in enumerate(zip(chosen, numbered, counts, strict=True)):
            where = place, choice, np.concatenate([np.arange(length) for length in count])
            ids[where], labels[where], mask[where] = rows.piece("input_ids", row), rows.piece("labels", row), 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        batch |= {name: values[chosen] for name, values in rows.fixed.items()}
        return {name: torch.from_numpy(values) for name, values in batch.items()}

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of every row, summed over the tokens of its right choice."""
        return super().row_losses(model, _right(batch))

    def row_weights(self, batch: Batch) -> Tensor:
        """The tokens of every row's right choice."""
        return super().row_weights(_right(batch))

    def statistics(self, model: nn.Module, batch: Batch) -> Statistics:
        """Summed loss and tokens of the right choice, and whether it is the most likely: as a whole, by character."""
        rows, choices = batch["labels"].shape[:2]
        score, tokens = torch.full((rows, choices), -torch.inf), torch.zeros(rows, choices, dtype=torch.long)
        for choice in range(choices):  # one after the other: logits are large
            there = (batch["labels"][:, choice] != IGNORED).any(-1)
            loss, _, learned = answer_losses(model, _option(batch, there, choice))
            score[there, choice], tokens[there, choice] = -loss.sum(1).cpu(), learned.sum(1).cpu()
        target, every = batch["target"].cpu(), torch.arange(rows)
        by_character = score / batch["characters"][:, :choices].cpu()
        return {
            "loss": -score[every, target].double().numpy(),
            "tokens": tokens[every, target].numpy(),
            "correct": (score.argmax(1) == target).numpy(),
            "correct_norm": (by_character.argmax(1) == target).numpy(),
        }

    def metrics(self, statistics: Statistics) -> dict[str, float]:
        """Accuracy, accuracy with likelihoods per character of the choice (``accuracy_norm``), and loss per token."""
        return {
            "accuracy": float(statistics["correct"].mean()),
            "accuracy_norm": float(statistics["correct_norm"].mean()),
            "loss": float(statistics["loss"].sum()) / float(statistics["tokens"].sum()),
        }

    def sample(self, model: nn.Module, rows: EncodedRows, row: int) -> dict[str, str] | None:
        """The question, the right choice and the most likely one."""
        batch = self.collate(rows, [row])
        with torch.no_grad():
            device = next(model.parameters()).device
            loss, _, _ = answer_losses(model, {key: batch[key][0].to(device) for key in PER_CHOICE})
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        prompt = ids[0][: int((labels[0] != IGNORED).long().argmax())]
        said = {"reference": int(batch["target"][0]), "answer": int(loss.sum(1).argmin())}
        text = {"prompt": prompt, **{name: ids[c][labels[c] != IGNORED] for name, c in said.items()}}
        return {key: str(self.tokenizer.decode(t, skip_special_tokens=True)).strip() for key, t in text.items()}


def _right(batch: Batch) -> Batch:
    """The right choices of a batch ``[b, t]``."""
    every = torch.arange(len(batch["target"]), device=batch["target"].device)
    return {key: batch[key][every, batch["target"]] for key in PER_CHOICE if key in batch}


def _option(batch: Batch, rows: Tensor, choice: int) -> Batch:
    """One choice ``[rows, t]`` of those rows of a batch that have it."""
    return {key: batch[key][rows, choice] for key in PER_CHOICE}
