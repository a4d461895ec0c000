"""Dialogues through a tokenizer's chat template: token ids, and which of them an assistant wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from fedlora.errors import InputError

Dialogue = Sequence[dict[str, str]]


def encode_dialogue(tokenizer: Any, dialogue: Dialogue, row: int) -> tuple[list[int], list[bool]]:
    """Token ids of a dialogue, and for each whether it belongs to an assistant turn (its end marker included).

    Works with any chat template whose text grows at its end only, as those of the common model families do. What
    follows the last answer is dropped; an assistant turn without text teaches nothing.

    Raises:
        InputError: the row is no dialogue, or the tokenizer has no (or an unusable) chat template.
    """
    turns = [dict(turn) for turn in _checked(dialogue, row)]
    text, marks = "", []
    for number, turn in enumerate(turns):
        if turn["role"] != "assistant" or not turn["content"].strip():
            continue
        before = _rendered(tokenizer, turns[:number], True, row)
        after = _rendered(tokenizer, turns[: number + 1], False, row)
        if not (before.startswith(text) and after.startswith(before)):
            raise InputError(
                f"Row {row + 1}: the tokenizer's chat template rewrites earlier turns, so answers cannot be told from "
                "prompts. Keep one user and one assistant turn a row (data.text, data.label), or set task.chat=false."
            )
        marks.append((len(before), len(after.rstrip())))
        text = after
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    learned = [any(start <= a and b <= end and a < b for start, end in marks) for a, b in spans]
    return list(encoded["input_ids"]), learned


def _checked(dialogue: Any, row: int) -> Dialogue:
    turns = list(dialogue) if isinstance(dialogue, Sequence) or hasattr(dialogue, "tolist") else []
    good = all(
        isinstance(t, dict) and isinstance(t.get("role"), str) and isinstance(t.get("content"), str) for t in turns
    )
    if isinstance(dialogue, str) or not turns or not good:
        raise InputError(
            f"Row {row + 1}: data.messages must hold lists of {{role, content}} objects with texts, like "
            '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
        )
    return turns


def _rendered(tokenizer: Any, turns: Dialogue, prompt: bool, row: int) -> str:
    if tokenizer.chat_template is None:
        raise InputError(
            "This backbone's tokenizer has no chat template. Use data.text and data.label with task.chat=false, or a "
            "backbone that was tuned for instructions."
        )
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, KeyError, TypeError) as error:
        raise InputError(f"Row {row + 1}: the chat template refuses this dialogue: {error}.") from error
