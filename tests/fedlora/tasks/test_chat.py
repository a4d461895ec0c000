from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer

from fedlora.errors import InputError
from fedlora.tasks import Schema, Task
from tests.fedlora.tasks.helpers import model_of, task_on

TEMPLATE = (
    "{% for m in messages %}[CLS]{{ m.role }} : {{ m.content }}[SEP]\n{% endfor %}"
    "{% if add_generation_prompt %}[CLS]assistant : {% endif %}"
)
ONLY_THE_LAST_ANSWER = TEMPLATE.replace(
    "{{ m.content }}", "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}"
)
REFUSING = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + TEMPLATE
DIALOGUE = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what is 3 plus 4?"},
    {"role": "assistant", "content": "7 of course"},
    {"role": "user", "content": "and 5?"},
    {"role": "assistant", "content": "it is 12"},
]


@pytest.fixture(scope="module")
def with_template(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    """A task whose tokenizer has the chat template given."""

    def build(template: str = TEMPLATE, **settings: object) -> Task:
        folder = tmp_path_factory.mktemp("chat")
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama, eos_token="[SEP]")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return task_on(tiny_llama, "causal_lm", tokenizer=folder, **settings)

    return build


def dialogues(*rows: object) -> pd.DataFrame:
    return pd.DataFrame({"messages": pd.Series(list(rows), dtype=object)})


def pair(prompt: str = "hello", completion: str = "a lovely film") -> pd.DataFrame:
    return pd.DataFrame({"text": [prompt], "label": [completion]})


def whole(task: Task, rows: pd.DataFrame) -> tuple[str, str]:
    """The text of the first row, and the text of its tokens that carry loss."""
    encoded = task.encode(rows, Schema(), 512)
    labels = encoded.piece("labels", 0)
    return task.tokenizer.decode(encoded.piece("input_ids", 0)), task.tokenizer.decode(labels[labels != -100])


def test_the_answers_of_every_turn_and_their_end_markers_are_learned_and_nothing_else(with_template):
    text, learned = whole(with_template(), dialogues(DIALOGUE))
    assert learned == "7 of course [SEP] it is 12 [SEP]"
    expected = " ".join(f"[CLS] {turn['role']} : {turn['content']} [SEP]" for turn in DIALOGUE)
    assert text == expected


def test_learned_tokens_are_the_tokens_of_the_row(with_template):
    rows = with_template().encode(dialogues(DIALOGUE, DIALOGUE[:3]), Schema(), 512)
    labels = rows.ragged["labels"]
    np.testing.assert_array_equal(labels[labels != -100], rows.ragged["input_ids"][labels != -100])
    assert len(rows) == 2


def test_a_dialogue_is_what_the_tokenizer_makes_of_it(with_template):
    task = with_template()
    expected = task.tokenizer.apply_chat_template(DIALOGUE, return_dict=False)
    assert task.encode(dialogues(DIALOGUE), Schema(), 512).piece("input_ids", 0).tolist() == expected


def test_dialogues_may_come_as_arrays_as_parquet_gives_them(with_template):
    task = with_template()
    assert whole(task, dialogues(np.array(DIALOGUE, dtype=object))) == whole(task, dialogues(DIALOGUE))


def test_what_follows_the_last_answer_is_dropped(with_template):
    task = with_template()
    unanswered = [*DIALOGUE, {"role": "user", "content": "thank you"}]
    assert whole(task, dialogues(unanswered)) == whole(task, dialogues(DIALOGUE))


def test_a_pair_is_one_user_and_one_assistant_turn(with_template):
    text, learned = whole(with_template(), pair())
    assert text == "[CLS] user : hello [SEP] [CLS] assistant : a lovely film [SEP]"
    assert learned == "a lovely film [SEP]"


@pytest.mark.parametrize(("chat", "used"), [("auto", True), (True, True), (False, False)])
def test_pairs_use_the_template_as_the_setting_says(with_template, chat: object, used: bool):
    text, _ = whole(with_template(chat=chat), pair())
    assert ("user :" in text) == used


def test_auto_goes_without_a_template_where_there_is_none(tiny_llama: Path):
    text, _ = whole(task_on(tiny_llama, "causal_lm", chat="auto"), pair())
    assert text == "[CLS] hello [SEP] a lovely film"


@pytest.mark.parametrize("rows", [pair(), dialogues(DIALOGUE)])
def test_a_tokenizer_without_a_template_is_refused(tiny_llama: Path, rows: pd.DataFrame):
    with pytest.raises(InputError, match=r"no chat template.*task\.chat=false"):
        whole(task_on(tiny_llama, "causal_lm", chat=True), rows)


def test_a_template_that_rewrites_earlier_turns_is_refused_for_several_turns_only(with_template):
    task = with_template(ONLY_THE_LAST_ANSWER)
    assert whole(task, pair())[1] == "a lovely film [SEP]"
    with pytest.raises(InputError, match=r"Row 2: the tokenizer's chat template rewrites earlier turns.*data\.text"):
        task.encode(dialogues(DIALOGUE[1:3], DIALOGUE), Schema(), 512)


def test_a_dialogue_that_the_template_refuses_is_named(with_template):
    with pytest.raises(InputError, match="Row 2: the chat template refuses this dialogue: user first"):
        with_template(REFUSING).encode(dialogues(DIALOGUE[1:], DIALOGUE), Schema(), 512)


@pytest.mark.parametrize(
    "bad",
    [
        "hello", 7, None, [], ["hello"], [{"role": "user"}], [{"role": "user", "content": None}],
        [{"from": "human", "value": "hello"}],
    ],
)  # fmt: skip
def test_what_is_no_dialogue_is_refused_with_its_row(with_template, bad: object):
    with pytest.raises(InputError, match=r"Row 2: data\.messages must hold lists of \{role, content\}"):
        with_template().encode(dialogues(DIALOGUE, bad), Schema(), 512)


@pytest.mark.parametrize("turns", [[DIALOGUE[1]], [DIALOGUE[1], {"role": "assistant", "content": " "}]])
def test_a_dialogue_without_an_answer_is_refused_with_its_row(with_template, turns: list):
    with pytest.raises(InputError, match=r"Row 2 has no answer tokens.*assistant turns of data\.messages"):
        with_template().encode(dialogues(DIALOGUE, turns), Schema(), 512)


def test_a_long_dialogue_is_cut_but_its_first_answer_stays(with_template):
    task = with_template()
    full = task.encode(dialogues(DIALOGUE), Schema(), 512)
    length = int(full.lengths(np.array([0]))[0])
    cut = task.encode(dialogues(DIALOGUE), Schema(), length - 6)
    assert cut.truncated == 1
    assert cut.piece("input_ids", 0).tolist() == full.piece("input_ids", 0)[6:].tolist()
    short = task.encode(dialogues(DIALOGUE), Schema(), 8)
    first = int(np.flatnonzero(full.piece("labels", 0) != -100)[0])
    assert short.piece("input_ids", 0).tolist() == full.piece("input_ids", 0)[first - 1 : first + 7].tolist()


def test_the_sample_of_a_dialogue_asks_for_its_last_answer(with_template):
    task = with_template(max_new_tokens=3)
    found = task.sample(model_of(task, Schema()), task.encode(dialogues(DIALOGUE), Schema(), 512), 0)
    assert found["reference"] == "it is 12"
    assert found["prompt"].endswith("and 5? assistant :")
