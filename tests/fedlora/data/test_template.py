"""A template makes one text of several columns, and says what is wrong with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedlora.data.template import is_template, render
from fedlora.errors import InputError

TABLE = pd.DataFrame(
    {
        "instruction": ["Add.", "Translate."],
        "input": ["1 + 2", None],
        "answer": [3, 4],
        "options": [{"A": "x", "B": "y"}, {"A": "u", "B": "v"}],
        "contexts": [np.array(["one.", "two."]), ["three."]],
        "full name": ["a", "b"],
    }
)


def filled(template: str, table: pd.DataFrame = TABLE) -> list[str]:
    return render(template, table, "data.text", "rows.jsonl").to_list()


@pytest.mark.parametrize(
    ("setting", "expected"),
    [("text", False), ("a column {x}", False), ("{{ a }}", True), ("{% if a %}b{% endif %}", True)],
)
def test_a_template_is_told_from_a_column(setting: str, expected: bool) -> None:
    assert is_template(setting) is expected


def test_every_row_is_filled_and_stripped() -> None:
    assert filled("\n{{ instruction }} -> {{ answer }}\n") == ["Add. -> 3", "Translate. -> 4"]


def test_missing_values_are_empty_so_that_a_condition_can_skip_them() -> None:
    assert filled("{{ instruction }}{% if input %}\n{{ input }}{% endif %}") == ["Add.\n1 + 2", "Translate."]
    table = pd.DataFrame({"a": [1.5, np.nan], "b": pd.Series([None, "x"], dtype="str"), "c": [pd.NaT, pd.NA]})
    assert filled("[{{ a }}|{{ b }}|{{ c }}]", table) == ["[1.5||]", "[|x|]"]


def test_lists_and_objects_of_a_row_can_be_used() -> None:
    assert filled("{{ options.B }} {{ contexts | join(' ') }}") == ["y one. two.", "v three."]


def test_a_constant_is_the_same_for_every_row() -> None:
    assert filled("{{ 'yes' }}") == ["yes", "yes"]


def test_braces_inside_the_data_are_text() -> None:
    assert filled("{{ q }}", pd.DataFrame({"q": ["{{ 1 + 1 }} {% x %}"]})) == ["{{ 1 + 1 }} {% x %}"]


@pytest.mark.parametrize("template", ["{{ instructoin }}", "{% if instructoin %}x{% endif %}"])
def test_an_unknown_column_is_named_with_the_columns_there_are(template: str) -> None:
    with pytest.raises(
        InputError, match=r"data\.text: 'instructoin' is undefined.*'rows\.jsonl': instruction, input, answer"
    ):
        filled(template)


def test_an_unknown_part_of_a_column_is_named() -> None:
    with pytest.raises(InputError, match=r"data\.text: .*no attribute 'C'"):
        filled("{{ options.C }}")


@pytest.mark.parametrize(
    "template",
    ["{{ instruction", "{% if input %}", "{{ instruction | nofilter }}", "{{ answer + input }}", "{{ 1 / 0 }}"],
)
def test_a_template_that_does_not_work_is_shown(template: str) -> None:
    with pytest.raises(InputError, match=r"data\.text = '.*' is not a template that fits the data: "):
        filled(template)


@pytest.mark.parametrize(
    "template",
    ["{{ instruction.__class__.__mro__ }}", "{{ ''.__class__.__subclasses__() }}", "{{ cycler.__init__.__globals__ }}"],
)
def test_a_template_cannot_reach_into_python(template: str) -> None:
    with pytest.raises(InputError, match=r"data\.text"):
        filled(template)


def test_a_hundred_thousand_rows_are_filled_in_seconds() -> None:
    table: Any = pd.DataFrame({"a": np.arange(100_000), "b": "text", "unused": [[1]] * 100_000})
    assert filled("{{ a }} {{ b }}", table)[-1] == "99999 text"
