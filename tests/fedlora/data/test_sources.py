"""Every source gives the same canonical table, and every bad input names the setting that mends it."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
import yaml

from fedlora.config import DataConfig
from fedlora.data.sources import SOURCES, load_rows
from fedlora.errors import InputError

CONF = Path(__file__).parents[3] / "conf" / "data"
TABLE = pd.DataFrame(
    {
        "review": ["good", "NA", "bad, but long", "ärgerlich"],
        "title": ["1", "2", "3", "4"],
        "stars": [5, 3, 1, 2],
        "hospital": ["007", "007", "010", "None"],
    }
)


def write(source: str, folder: Path, table: pd.DataFrame = TABLE) -> str:
    path = folder / f"rows.{source}"
    if source == "csv":
        table.to_csv(path, index=False)
    elif source == "jsonl":
        table.to_json(path, orient="records", lines=True)
    elif source == "parquet":
        table.to_parquet(path)
    else:
        datasets.Dataset.from_pandas(table).save_to_disk(str(path))
    return str(path)


def config(name: str = "csv", path: str | None = None, **settings: object) -> DataConfig:
    named = {"text": "review", "label": "stars", "client": "hospital", **settings}
    return DataConfig.model_validate({"name": name, "path": path, **named})


def test_every_source_has_a_file_and_every_file_a_source() -> None:
    found = [yaml.safe_load(path.read_text()) for path in CONF.glob("*.yaml")]
    named = {values.get("data", values).get("name", "hf") for values in found}  # presets take the name from hf.yaml
    assert named == set(SOURCES)


def test_a_source_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"data\.name = 'parkett' is no source\. Did you mean 'parquet'"):
        load_rows(config("parkett"))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
def test_every_file_source_gives_the_same_rows(source: str, tmp_path: Path) -> None:
    rows = load_rows(config(source, write(source, tmp_path), text_pair="title"))
    expected = {"text": "review", "text_pair": "title", "label": "stars", "client": "hospital"}
    assert rows.to_dict("list") == {name: TABLE[column].tolist() for name, column in expected.items()}
    assert rows.index.equals(pd.RangeIndex(4))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
def test_columns_that_are_not_named_are_left_out(source: str, tmp_path: Path) -> None:
    rows = load_rows(config(source, write(source, tmp_path), client=None))
    assert list(rows.columns) == ["text", "label"]


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
def test_numbers_become_text_where_text_is_asked_for(source: str, tmp_path: Path) -> None:
    settings = {"text": "stars", "text_pair": "stars", "label": "review", "client": "stars"}
    rows = load_rows(config(source, write(source, tmp_path), **settings))
    assert list(rows["text"]) == list(rows["text_pair"]) == list(rows["client"]) == ["5", "3", "1", "2"]


def test_json_values_stay_as_they_are_written_whatever_their_column_is_called(tmp_path: Path) -> None:
    path = tmp_path / "visits.jsonl"
    path.write_text('{"modified": "a", "made_at": "1577836800", "date": "2020-01-01"}\n')
    data = DataConfig(name="jsonl", path=str(path), text="made_at", label="date", client="modified")
    assert load_rows(data).iloc[0].to_dict() == {"text": "1577836800", "label": "2020-01-01", "client": "a"}


def test_the_group_of_a_client_is_a_column_or_a_template(tmp_path: Path) -> None:
    data = config("csv", write("csv", tmp_path), group="{{ 'high' if stars > 2 else 'low' }}")
    assert load_rows(data)["group"].to_list() == ["high", "high", "low", "low"]
    named = load_rows(config("csv", write("csv", tmp_path), group="stars"))
    assert named["group"].to_list() == ["5", "3", "1", "2"]


def test_limit_keeps_the_first_rows(tmp_path: Path) -> None:
    assert load_rows(config(path=write("csv", tmp_path), limit=2))["label"].to_list() == [5, 3]


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
def test_a_path_must_be_set(source: str) -> None:
    with pytest.raises(InputError, match=r"data\.path is not set"):
        load_rows(config(source))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet"])
def test_a_path_must_exist(source: str) -> None:
    with pytest.raises(InputError, match=r"data\.path = 'nowhere' does not exist"):
        load_rows(config(source, "nowhere"))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
@pytest.mark.parametrize("setting", ["text", "text_pair", "label", "client"])
def test_a_missing_column_names_the_setting_and_the_columns(source: str, setting: str, tmp_path: Path) -> None:
    path = write(source, tmp_path)
    with pytest.raises(
        InputError, match=rf"data\.{setting} = 'starz' .* Did you mean 'stars'\? .*review, title, stars"
    ):
        load_rows(config(source, path, **{setting: "starz"}))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
@pytest.mark.parametrize(("setting", "column"), [("text", "review"), ("label", "stars"), ("client", "hospital")])
def test_missing_values_are_counted_and_located(source: str, setting: str, column: str, tmp_path: Path) -> None:
    table = TABLE.copy()
    table[column] = table[column].mask([False, True, False, True])
    with pytest.raises(InputError, match=rf"data\.{setting}: 2 of 4 values .* the first in row 2 "):
        load_rows(config(source, write(source, tmp_path, table)))


def test_nested_values_are_refused_unless_the_task_reads_them(tmp_path: Path) -> None:
    path = write("jsonl", tmp_path, TABLE.assign(review=[["a"], ["b", "c"], ["c"], ["d"]]))
    with pytest.raises(InputError, match=r"data\.text: 4 values .* lists or objects"):
        load_rows(config("jsonl", path))
    assert load_rows(config("jsonl", path), nested=["text"])["text"].to_list() == [["a"], ["b", "c"], ["c"], ["d"]]


def test_lists_beside_plain_values_are_refused_even_where_lists_are_read(tmp_path: Path) -> None:
    path = write("jsonl", tmp_path, TABLE.assign(review=[["a"], "b", ["c"], ["d"]]))
    with pytest.raises(InputError, match=r"data\.text: .* mixed types: 3 are lists .* such as 'b' in row 2"):
        load_rows(config("jsonl", path), nested=["text"])


@pytest.mark.parametrize("values", [[1, "1", 2, 3], ["1", 1, "2", "3"]])
def test_labels_of_mixed_types_are_refused(values: list[object], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"review": "x", "stars": value, "hospital": 1}) + "\n" for value in values))
    with pytest.raises(InputError, match=r"data\.label: .* mixed types: [13] are text and [13] are not.* row 2\."):
        load_rows(config("jsonl", str(path)))


def test_clients_may_be_of_mixed_types(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"review": "x", "stars": 1, "hospital": 7}\n{"review": "y", "stars": 2, "hospital": "east"}\n')
    assert load_rows(config("jsonl", str(path)))["client"].to_list() == ["7", "east"]


@pytest.mark.parametrize("role", ["text_pair", "messages", "choices"])
def test_a_role_that_the_task_does_not_read_is_refused(role: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"data\.{role} = 'title' has no effect with this task, which reads"):
        load_rows(config(path=write("csv", tmp_path), **{role: "title"}), columns=("text", "label"))


@pytest.mark.parametrize("role", ["text", "label", "image"])
def test_a_role_that_the_task_needs_must_be_set(role: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"data\.{role} is not set, and this task needs it"):
        load_rows(config(path=write("csv", tmp_path), **{role: None}), columns=("text", "label", "image"))


def test_dialogues_take_the_place_of_text_and_label(tmp_path: Path) -> None:
    dialogue = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    path = write("jsonl", tmp_path, pd.DataFrame({"turns": [dialogue, dialogue], "site": ["a", "b"]}))
    rows = load_rows(
        config("jsonl", path, messages="turns", client="site"),
        columns=("messages", "text", "label"),
        nested=("messages",),
    )
    assert list(rows.columns) == ["messages", "client"]
    assert rows["messages"].to_list() == [dialogue, dialogue]


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
def test_choices_may_be_several_columns_or_templates(source: str, tmp_path: Path) -> None:
    asked = {"choices": ["title", "{{ review }}!", "{{ 'neither' }}"], "client": None}
    rows = load_rows(config(source, write(source, tmp_path), **asked), ("text", "choices", "label"), ("choices",))
    assert rows["choices"].to_list() == [
        [t, f"{r}!", "neither"] for t, r in zip(TABLE.title, TABLE.review, strict=True)
    ]


@pytest.mark.parametrize("source", ["jsonl", "parquet", "hf"])
def test_choices_may_be_one_column_of_lists(source: str, tmp_path: Path) -> None:
    lists = [["a", "b"], ["c", "d", "e"], ["f"], ["g"]]
    path = write(source, tmp_path, TABLE.assign(options=lists))
    rows = load_rows(config(source, path, choices="options"), ("text", "choices", "label"), ("choices",))
    assert [list(choices) for choices in rows["choices"]] == lists


def test_a_missing_column_among_choices_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.choices = 'titel' is not a column .* Did you mean 'title'\?"):
        load_rows(config(path=write("csv", tmp_path), choices=["title", "titel"]), ("text", "choices", "label"))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet", "hf"])
def test_a_template_joins_columns_the_same_way_in_every_source(source: str, tmp_path: Path) -> None:
    template = "{{ title }}: {{ review }}{% if hospital == '007' %} (bond){% endif %}"
    rows = load_rows(config(source, write(source, tmp_path), text=template, client="{{ hospital[:2] }}"))
    assert rows["text"].to_list() == ["1: good (bond)", "2: NA (bond)", "3: bad, but long", "4: ärgerlich"]
    assert rows["client"].to_list() == ["00", "00", "01", "No"]


def test_csv_columns_of_a_template_stay_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("code,count,stars\n007,5,1\n008,,2\n")
    rows = load_rows(config(path=str(path), text="{{ code }}/{{ count }}", client=None))
    assert rows["text"].to_list() == ["007/5", "008/"]


def test_rows_without_text_from_a_template_are_left_out_and_counted(tmp_path: Path) -> None:
    label = "{% if stars|int > 2 %}{{ stars }}{% endif %}"
    rows = load_rows(config(path=write("csv", tmp_path), label=label))
    assert rows["text"].to_list() == ["good", "NA"]
    assert rows.index.equals(pd.RangeIndex(2))
    assert rows.attrs["left_out"] == 2


def test_a_template_that_leaves_out_every_row_is_refused(tmp_path: Path) -> None:
    path = write("csv", tmp_path)
    with pytest.raises(InputError, match=r"data\.label = .* gives no text for any of the 4 rows"):
        load_rows(config(path=path, label="{% if stars == 'six' %}6{% endif %}"))
    with pytest.raises(InputError, match="leave no row"):
        load_rows(config(path=path, label="{{ stars if stars == '5' }}", text="{{ review if stars != '5' }}"))


@pytest.mark.parametrize("source", ["csv", "jsonl", "parquet"])
def test_a_table_without_rows_is_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no rows"):
        load_rows(config(source, write(source, tmp_path, TABLE.head(0))))


def test_a_saved_dataset_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.path"):
        load_rows(config("hf", write("hf", tmp_path, TABLE.head(0))))


@pytest.mark.parametrize(
    ("source", "content"),
    [("csv", b'a,b\n"1,2'), ("csv", b"review,stars\n\xff,1"), ("jsonl", b"{not json"), ("parquet", b"not parquet")],
)
def test_a_file_that_cannot_be_read_is_explained(source: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"cannot be read as {source}"):
        load_rows(config(source, str(path)))


@pytest.mark.parametrize("source", ["csv", "jsonl"])
def test_an_empty_file_is_refused(source: str, tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.touch()
    with pytest.raises(InputError, match="has no rows"):
        load_rows(config(source, str(path)))
