r"""The answer in a text that a model wrote: what follows ``####`` or "The answer is", a number, or a letter.

The rules are those of the data sets' own evaluations: GSM8K (Cobbe et al. 2021) ends in ``#### 42``, MATH (Hendrycks et
al. 2021) boxes its answers, MetaMathQA (Yu et al. 2024) and LLM-Adapters (Hu et al. 2023) write "the answer is", and
everything else is compared as SQuAD does (Rajpurkar et al. 2016).
"""

from __future__ import annotations

import re
import string
from decimal import Decimal
from typing import Literal

Extraction = Literal["final", "number", "letter", "none"]

NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+"
ARTICLES = re.compile(r"\b(a|an|the)\b")
ANSWER_IS = re.compile(r"answer\s+is\s*:?|answer\s*:", re.IGNORECASE)
LETTERS = (
    re.compile(r"(?i:answer|option|choice)(?:\s+is)?[\s:(\[*]*([A-Z])(?![A-Za-z'])"),
    re.compile(r"(?i:answer|option|choice)(?:\s+is)?[\s:(\[*]*([a-z])(?=\s*$|[).\]*])"),
    re.compile(r"^\W*([A-Z])(?=\s*$|[).:,\]*])"),
    re.compile(r"^\W*([a-z])(?=\s*$|[).:\]*])"),
    re.compile(r"[(\[]([A-Z])[)\]]"),
    re.compile(r"(?<![A-Za-z'])([B-HJ-Z])(?![A-Za-z'])"),
)


def extract(text: str, how: Extraction) -> str | None:
    r"""The answer in ``text`` in a form in which equal answers are equal strings, or ``None`` if there is none.

    Args:
        text: what a model, or the author of the data, wrote.
        how: ``final``: what is in the last ``\boxed{}`` or follows the last ``####`` or "answer is", or else the whole
            text. ``number``: the number there, or else the last number of the text. ``letter``: the letter of a
            choice, as in "(B)" or "The answer is B". ``none``: the whole text.
    """
    if how == "letter":
        found = next((match for pattern in LETTERS if (match := pattern.search(text.strip()))), None)
        return found.group(1).upper() if found else None
    if how == "number":
        marked = marked_answer(text)
        numbers = re.findall(NUMBER, marked or "")[:1] or re.findall(NUMBER, text)[-1:]
        return canonical_number(numbers[0]) if numbers else None
    if how == "final":
        marked = marked_answer(text)
        return plain_answer(text if marked is None else marked)
    return squad_text(text)


def marked_answer(text: str) -> str | None:
    """What a text marks as its answer, to the end of that sentence or line; ``None`` without a mark."""
    if "####" in text:
        rest = text.rpartition("####")[2]
    elif "\\boxed{" in text:
        return _braced(text.rpartition("\\boxed{")[2])
    else:
        marks = list(ANSWER_IS.finditer(text))
        if not marks:
            return None
        rest = text[marks[-1].end() :]
    lines = rest.strip().splitlines()
    return re.split(r"\.\s", lines[0] + " ")[0].strip() if lines else ""


def plain_answer(text: str) -> str:
    """A number in its shortest form, a formula without its layout, or words as SQuAD compares them."""
    bare = text.strip().strip("$ ").rstrip(".").replace("\\$", "").replace("\\%", "").strip("$% ")
    if re.fullmatch(NUMBER, bare):
        return canonical_number(bare)
    has_words, has_digits = re.search(r"[^\W\d_]{3}", bare), re.search(r"\d", bare)
    return formula(bare) if "\\" in bare or (has_digits and not has_words) else squad_text(bare)


def canonical_number(number: str) -> str:
    """``1,000.50`` as ``1000.5``."""
    value = Decimal(number.replace(",", ""))
    return format(value.normalize(), "f") if value else "0"


def formula(text: str) -> str:
    """A LaTeX formula without spaces, sizes and the like."""
    text = re.sub(r"\\(left|right|displaystyle|[!,;: ])", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", r"\1", text))
    return re.sub(r"[\s$]", "", text)


def squad_text(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", bare).split())


def _braced(text: str) -> str:
    """The text up to the brace that closes it."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:place]
    return text
