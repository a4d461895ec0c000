"""Token classification: one tag a word, such as named entities (BIO tags) or parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pandas as pd
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForTokenClassification

from fedlora.encoded import EncodedRows
from fedlora.errors import InputError
from fedlora.tasks.base import IGNORED, Batch, Schema, Statistics, Task, TaskConfig, register
from fedlora.tasks.classification import count_longer, text_logits
from fedlora.tasks.entities import entity_counts, has_entities, scores, tag_counts
from fedlora.tasks.labels import class_schema


class TokenClassificationConfig(TaskConfig):
    """Token classification's settings.

    Attributes:
        tags: the names of tags that the data gives as numbers 0, 1, ..., in that order, such as ``[O, B-PER, I-PER]``.
    """

    tags: tuple[str, ...] | None = None


@register
class TokenClassification(Task):
    """``data.text`` holds the words of a row and ``data.label`` a tag for each, as lists or separated by spaces."""

    Config = TokenClassificationConfig
    name = "token_classification"
    auto_class = AutoModelForTokenClassification
    head_modules = ("classifier", "score")
    default_metric = "f1"
    columns = ("text", "label")
    nested = ("text", "label")

    def schema(self, rows: pd.DataFrame) -> Schema:
        """``task.tags``, or the sorted distinct tags of all rows.

        Raises:
            InputError: a row has not as many tags as words, or a tag is a number that ``task.tags`` does not name.
        """
        tags = [tag for _, of_row in self._rows(rows) for tag in of_row]
        names = cast(TokenClassificationConfig, self.config).tags
        return Schema(names) if names else class_schema(pd.DataFrame({"label": tags}))

    def agreed(self, rows: pd.DataFrame, labels: tuple[str, ...]) -> Schema:
        """``labels`` as the tags, in this order."""
        return Schema(labels)

    def encode(self, rows: pd.DataFrame, schema: Schema, max_length: int) -> EncodedRows:
        """Tokenise the words; ``labels`` carry a word's tag on its first token, so that every word counts once.

        Words that do not fit ``max_length`` are not tagged at all, and their rows count as truncated.
        """
        number = {tag: i for i, tag in enumerate(schema.labels)}
        words, tags = zip(*self._rows(rows), strict=True)
        texts = [" ".join(of_row) for of_row in words]
        encoded = self.tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
        ids, spans = cast(Any, encoded["input_ids"]), cast(Any, encoded["offset_mapping"])
        labels = []
        for row, of_row in enumerate(tags):
            learned = [IGNORED] * len(ids[row])
            for place, word in first_tokens(words[row], spans[row]):
                learned[place] = number[of_row[word]]
            labels.append(learned)
        truncated = count_longer(self.tokenizer, texts, None, ids, max_length)
        return EncodedRows.from_lists({"input_ids": ids, "labels": labels}, {}, truncated)

    def _rows(self, rows: pd.DataFrame) -> list[tuple[list[str], list[str]]]:
        """Words and tags of every row."""
        names = cast(TokenClassificationConfig, self.config).tags
        found = []
        for row, (text, label) in enumerate(zip(rows["text"], rows["label"], strict=True)):
            words, tags = pieces(text), pieces(label)
            if len(words) != len(tags) or not words:
                raise InputError(
                    f"Row {row + 1} has {len(words)} words (data.text) and {len(tags)} tags (data.label); rows count "
                    "from 1. Both must be lists of the same length, or texts separated by spaces."
                )
            found.append((words, [_named(tag, names, row) for tag in tags]))
        return found

    def model_overrides(self, schema: Schema) -> dict[str, Any]:
        """The tags, from which :meth:`statistics` knows what they mean and the exported model as well."""
        names = dict(enumerate(schema.labels))
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {tag: i for i, tag in names.items()},
            "pad_token_id": self.backbone.pad_id,
        }

    def row_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of every row, summed over its words."""
        logits, labels = text_logits(model, batch).flatten(0, 1), batch["labels"].flatten()
        return functional.cross_entropy(logits, labels, reduction="none").view_as(batch["labels"]).sum(1)

    def row_weights(self, batch: Batch) -> Tensor:
        """The words of every row."""
        return (batch["labels"] != IGNORED).sum(1)

    def statistics(self, model: nn.Module, batch: Batch) -> Statistics:
        """Summed loss, words and right words of every row, and counts ``[rows, 3, kinds]`` of right, predicted, actual.

        Kinds are all entities together where the tags are a BIO scheme, else each tag.
        """
        logits, labels = text_logits(model, batch), batch["labels"]
        loss = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
        names: dict[int, str] = cast(Any, model).config.id2label
        tags = [names[i] for i in range(len(names))]
        spans, counts = has_entities(tags), []
        for guess, truth in zip(logits.argmax(-1).cpu().numpy(), labels.cpu().numpy(), strict=True):
            predicted, actual = guess[truth != IGNORED], truth[truth != IGNORED]
            if spans:
                found = entity_counts([tags[i] for i in predicted], [tags[i] for i in actual])
                counts.append(np.array(found)[:, None])
            else:
                counts.append(tag_counts(predicted, actual, len(tags)))
        return {
            "loss": loss.sum(1).double().cpu().numpy(),
            "words": (labels != IGNORED).sum(1).cpu().numpy(),
            "right": (logits.argmax(-1) == labels).sum(1).cpu().numpy(),
            "counts": np.stack(counts),
        }

    def metrics(self, statistics: Statistics) -> dict[str, float]:
        """F1, precision and recall, token accuracy and loss per word.

        The first three are of entities that are right in kind and span, all kinds together (micro); where tags are no
        BIO scheme, they are the mean over the tags that occur (macro).
        """
        words = max(int(statistics["words"].sum()), 1)
        return {
            **scores(*statistics["counts"].sum(0)),
            "token_accuracy": float(statistics["right"].sum()) / words,
            "loss": float(statistics["loss"].sum()) / words,
        }


def pieces(value: Any) -> list[str]:
    """A row's words or tags: a list or an array, or a text separated by spaces."""
    return value.split() if isinstance(value, str) else [str(item) for item in np.atleast_1d(value).tolist()]


def first_tokens(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first token of every word that has one: pairs (place of the token, number of the word).

    Args:
        words: the words of a row, which its text joins by single spaces.
        spans: first and last + 1 character of every token; a token belongs to the word of its last character.
    """
    word_at = np.repeat(np.arange(len(words)), [len(word) + 1 for word in words])
    first: dict[int, int] = {}
    for place, (start, end) in enumerate(spans):
        if start < end:
            first.setdefault(int(word_at[end - 1]), place)
    return [(place, word) for word, place in first.items()]


def _named(tag: str, names: tuple[str, ...] | None, row: int) -> str:
    if names is None or tag in names:
        return tag
    if tag.isdecimal() and int(tag) < len(names):
        return names[int(tag)]
    raise InputError(
        f"Row {row + 1} has the tag {tag!r} (data.label), which is not one of the {len(names)} of task.tags = "
        f"{list(names)}. Correct task.tags, or set task.tags=null to use the tags as the data has them."
    )
