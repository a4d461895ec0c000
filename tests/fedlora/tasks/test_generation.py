from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from fedlora.errors import InputError
from fedlora.tasks import Schema, Task
from fedlora.tasks.answers import extract
from fedlora.tasks.causal_lm import generate
from tests.fedlora.tasks.helpers import model_of, task_on

PROMPTS = ["what is 3 plus 4?", "name a very lovely film with a superb plot", "hello"]
COMPLETIONS = ["it is 7 of course", "the answer is 12", "7"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }}[SEP]{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def task_of(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory):
    """Build the task with a tokenizer that has an end token and a chat template."""
    folder = tmp_path_factory.mktemp("ending")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, eos_token="[SEP]")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)

    def build(**settings: object) -> Task:
        return task_on(tiny_llama, "generation", tokenizer=folder, **{"chat": False, "max_new_tokens": 4} | settings)

    return build


@pytest.fixture(scope="module")
def model(task_of) -> nn.Module:
    return model_of(task_of(), Schema())


def frame(completions: list = COMPLETIONS) -> pd.DataFrame:
    return pd.DataFrame({"text": PROMPTS, "label": completions})


def written(task: Task, model: nn.Module) -> list[str]:
    """What the model answers to every prompt."""
    prompts = [task.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return [task.tokenizer.decode(ids, skip_special_tokens=True) for ids in generate(model, task.tokenizer, prompts, 4)]


def test_it_learns_what_causal_lm_learns(task_of, model: nn.Module, tiny_llama: Path):
    task, plain = (
        task_of(),
        task_on(tiny_llama, "causal_lm", tokenizer=Path(task_of().tokenizer.name_or_path), chat=False),
    )
    rows, same = task.encode(frame(), Schema(), 64), plain.encode(frame(), Schema(), 64)
    for name in ("input_ids", "labels"):
        np.testing.assert_array_equal(rows.ragged[name], same.ragged[name])
    batch = task.collate(rows, [0, 1, 2])
    torch.testing.assert_close(task.loss(model, batch), plain.loss(model, batch))
    statistics = task.statistics(model, batch)
    assert plain.metrics(statistics).items() <= task.metrics(statistics).items()


@pytest.mark.parametrize("extract", ["final", "none"])
def test_the_models_own_answers_match_exactly_and_no_others(task_of, model: nn.Module, extract: str):
    task = task_of(extract=extract)
    answers = written(task, model)
    rows = task.encode(frame([answers[0], "something else", answers[2].upper() + " !"]), Schema(), 64)
    found = task.statistics(model, task.collate(rows, [2, 0, 1]))
    assert found["exact_match"].tolist() == [True, True, False]
    assert found["rouge_l"][1] == pytest.approx(1.0)
    assert found["rouge_l"][2] < 1.0
    assert task.metrics(found)["exact_match"] == pytest.approx(2 / 3)


def test_answers_are_compared_as_extracted(task_of, model: nn.Module):
    task = task_of(extract="number")
    said = [extract(text, "number") for text in written(task, model)]
    assert any(said)
    rows = task.encode(frame([f"it is {number or 3} of course" for number in said]), Schema(), 64)
    found = task.statistics(model, task.collate(rows, [0, 1, 2]))
    assert found["exact_match"].tolist() == [number is not None for number in said]


def test_a_reference_that_is_cut_is_compared_whole(task_of):
    whole, cut = (task_of().encode(frame(), Schema(), length) for length in (64, 4))
    assert cut.truncated > 0
    np.testing.assert_array_equal(whole.fixed["answer"], cut.fixed["answer"])


def test_the_last_turn_of_a_dialogue_is_answered(task_of, model: nn.Module):
    task = task_of(extract="number")
    turns = [("user", "hi"), ("assistant", "it is 5"), ("user", "and now?"), ("assistant", "it is 6")]
    dialogue = [{"role": role, "content": text} for role, text in turns]
    rows = task.encode(pd.DataFrame({"messages": [dialogue]}), Schema(), 64)
    six = task.encode(frame(["6", "1", "2"]), Schema(), 64).fixed["answer"][0]
    assert rows.fixed["answer"].tolist() == [six]
    assert set(task.statistics(model, task.collate(rows, [0]))) == {
        "loss", "tokens", "correct", "exact_match", "rouge_l"
    }  # fmt: skip


@pytest.mark.parametrize("extract", ["number", "letter"])
def test_a_reference_without_what_is_compared_is_refused_with_its_row(task_of, extract: str):
    labels = {"number": ["7", "seven", "8"], "letter": ["A", "perhaps", "B"]}[extract]
    with pytest.raises(InputError, match=rf"Row 2 has no {extract} in its answer.*task\.extract=none"):
        task_of(extract=extract).encode(frame(labels), Schema(), 64)


def test_an_unknown_extraction_is_refused(task_of):
    with pytest.raises(InputError, match=r"'task\.extract' = 'numbers' is not valid"):
        task_of(extract="numbers")
