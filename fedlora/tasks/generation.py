"""Generation: train as a causal language model, then let it write answers and compare them with the references."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any, cast

import numpy as np
import pandas as pd
from pydantic import Field
from torch import nn

from fedlora.encoded import EncodedRows
from fedlora.errors import InputError
from fedlora.tasks.answers import Extraction, extract
from fedlora.tasks.base import Batch, Schema, Statistics, plain_text, register
from fedlora.tasks.causal_lm import CausalLM, CausalLMConfig, generate, split_last_answer


class GenerationConfig(CausalLMConfig):
    """Generation's settings.

    Attributes:
        max_new_tokens: the longest answer that is generated; a longer one is cut, and is wrong.
        extract: what of an answer is compared; see :func:`fedlora.tasks.answers.extract`.
    """

    max_new_tokens: int = Field(default=128, ge=1)
    extract: Extraction = "final"


@register
class Generation(CausalLM):
    """``data.text`` is the prompt and ``data.label`` the answer, or the last turn of ``data.messages`` is."""

    Config = GenerationConfig
    name = "generation"
    default_metric = "exact_match"

    def encode(self, rows: pd.DataFrame, schema: Schema, max_length: int) -> EncodedRows:
        """The rows of :class:`CausalLM`, and ``answer [rows]``: a hash of the reference's extracted answer.

        The hash is of the whole reference, even where its tokens are cut to ``max_length``.
        """
        encoded = super().encode(rows, schema, max_length)
        how = cast(GenerationConfig, self.config).extract
        answers = [extract(text, how) for text in _references(rows)]
        if None in answers:
            raise InputError(
                f"Row {answers.index(None) + 1} has no {how} in its answer (data.label, or the last turn of "
                f"data.messages), and task.extract={how} compares those. Correct the row, or set task.extract=none."
            )
        hashes = np.array([_hash(answer) for answer in answers], dtype=np.int64)
        return EncodedRows(encoded.offsets, encoded.ragged, {"answer": hashes}, encoded.truncated)

    def statistics(self, model: nn.Module, batch: Batch) -> Statistics:
        """Those of :class:`CausalLM`, and of the generated answer: exact match and the F-measure of ROUGE-L."""
        ids, labels = batch["input_ids"].cpu().numpy(), batch["labels"].cpu().numpy()
        prompts, references = zip(*(split_last_answer(*row) for row in self._unpadded(batch, ids, labels)), strict=True)
        settings = cast(GenerationConfig, self.config)
        written = generate(model, self.tokenizer, list(prompts), settings.max_new_tokens)
        texts, truth = self._decoded(written), self._decoded(references)
        right = [_hash(extract(text, settings.extract)) for text in texts] == batch["answer"].cpu().numpy()
        rouge = [self._rouge.score(a, b)["rougeL"].fmeasure for a, b in zip(truth, texts, strict=True)]
        return super().statistics(model, batch) | {"exact_match": right, "rouge_l": np.array(rouge)}

    def metrics(self, statistics: Statistics) -> dict[str, float]:
        """Exact match of extracted answers, ROUGE-L (Lin 2004; English words) of whole ones, and those of causal LM."""
        generated = {name: float(statistics[name].mean()) for name in ("exact_match", "rouge_l")}
        return generated | super().metrics(statistics)

    def _unpadded(self, batch: Batch, ids: np.ndarray, labels: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        real = batch["attention_mask"].cpu().numpy() == 1
        return [(row[keep], answer[keep]) for row, answer, keep in zip(ids, labels, real, strict=True)]

    def _decoded(self, answers: Any) -> list[str]:
        return [str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]

    @cached_property
    def _rouge(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer  # slow to import

        return RougeScorer(["rougeL"], use_stemmer=False)


def _references(rows: pd.DataFrame) -> list[str]:
    """The text of every row's last answer."""
    if "messages" not in rows:
        return plain_text(rows, "label")
    turns = [[turn["content"] for turn in row if turn["role"] == "assistant"] for row in rows["messages"]]
    return [next(text for text in reversed(answers) if text.strip()) for answers in turns]


def _hash(answer: str | None) -> int:
    """63 bits of an answer; -1 for none."""
    if answer is None:
        return -1
    return int.from_bytes(hashlib.blake2b(answer.encode(), digest_size=8).digest(), "big") >> 1
