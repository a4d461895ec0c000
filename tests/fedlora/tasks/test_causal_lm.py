from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoTokenizer

from fedlora.encoded import EncodedRows
from fedlora.errors import InputError
from fedlora.tasks import Schema, Task
from fedlora.tasks.causal_lm import generate, split_last_answer
from tests.fedlora.tasks.helpers import inputs_of, model_of, task_on

PROMPTS = ["what is 3 plus 4?", "name a very lovely film with a superb plot", "hello"]
COMPLETIONS = ["7 of course", "none", "the film was a great and moving one"]


@pytest.fixture(scope="module")
def task(tiny_llama: Path) -> Task:
    return task_on(tiny_llama, "causal_lm")


@pytest.fixture(scope="module")
def model(task: Task) -> nn.Module:
    return model_of(task, Schema())


@pytest.fixture(scope="module")
def ending(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The task with a tokenizer that has an end token."""
    folder = tmp_path_factory.mktemp("ending")
    AutoTokenizer.from_pretrained(tiny_llama, eos_token="[SEP]").save_pretrained(folder)
    return task_on(tiny_llama, "causal_lm", tokenizer=folder)


def frame(prompts: list[str] = PROMPTS, completions: list = COMPLETIONS) -> pd.DataFrame:
    return pd.DataFrame({"text": prompts, "label": completions})


@pytest.fixture(scope="module")
def rows(task: Task) -> EncodedRows:
    return task.encode(frame(), Schema(), 64)


def answer(rows: EncodedRows, row: int) -> list[int]:
    """The tokens of a row that carry loss."""
    labels = rows.piece("labels", row)
    return labels[labels != -100].tolist()


def test_the_loss_is_transformers_own_with_the_prompt_masked(task: Task, model: nn.Module, rows: EncodedRows):
    batch = task.collate(rows, [0, 1, 2])
    assert (batch["attention_mask"] == 0).any()  # rows of unequal length
    expected = model(**inputs_of(batch), labels=batch["labels"]).loss
    torch.testing.assert_close(task.loss(model, batch), expected)


def test_every_answer_token_counts_and_no_prompt_token_does(task: Task, model: nn.Module, rows: EncodedRows):
    batch = task.collate(rows, [0, 1, 2])
    with torch.no_grad():
        found = task.statistics(model, batch)
        logits = model(**inputs_of(batch)).logits
    for row in range(3):
        ids = torch.tensor(rows.piece("input_ids", row))
        start = len(task.tokenizer(PROMPTS[row])["input_ids"])
        targets, scores = ids[start:], logits[row, start - 1 : len(ids) - 1]
        loss = functional.cross_entropy(scores, targets.long(), reduction="sum")
        assert found["tokens"][row] == len(ids) - start
        assert found["loss"][row] == pytest.approx(loss.item(), rel=1e-5)
        assert found["correct"][row] == int((scores.argmax(1) == targets).sum())
    assert task.weight(batch) == found["tokens"].sum()


def test_what_the_prompt_is_predicted_to_be_has_no_effect(task: Task, model: nn.Module, rows: EncodedRows):
    """The vocabulary is scored only where an answer token is predicted, not at prompts and padding."""
    batch = task.collate(rows, [0, 1, 2])
    kept: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: object, output) -> None:
        output.logits.requires_grad_().retain_grad()
        kept.append(output.logits)

    hook = model.register_forward_hook(keep)
    task.loss(model, batch).backward()
    hook.remove()
    assert kept[0].grad is not None
    assert kept[0].shape[1] == task.weight(batch)  # there is no other logit
    assert bool((kept[0].grad.abs().sum(-1) > 0).all())


def test_the_loss_does_not_depend_on_padding(task: Task, model: nn.Module, rows: EncodedRows):
    short = int(rows.lengths(np.arange(3)).argmin())
    with torch.no_grad():
        alone = task.statistics(model, task.collate(rows, [short]))
        beside = task.statistics(model, task.collate(rows, [short, (short + 1) % 3]))
    assert beside["loss"][0] == pytest.approx(alone["loss"][0], rel=1e-5)
    assert beside["tokens"][0] == alone["tokens"][0]


def test_a_row_is_prompt_then_completion_then_end(ending: Task):
    tokenizer = ending.tokenizer
    rows = ending.encode(frame(), Schema(), 64)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        head = tokenizer(prompt)["input_ids"]
        learned = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        assert rows.piece("input_ids", i).tolist() == [*head, *learned]
        assert rows.piece("labels", i).tolist() == [-100] * len(head) + learned
    assert rows.truncated == 0


@pytest.mark.parametrize("max_length", [4, 6, 9])
def test_truncation_keeps_the_completion_and_cuts_the_prompt_from_its_left(
    task: Task, rows: EncodedRows, max_length: int
):
    cut = task.encode(frame(), Schema(), max_length)
    for i in range(len(PROMPTS)):
        ids, labels = rows.piece("input_ids", i).tolist(), rows.piece("labels", i).tolist()
        start = labels.count(-100)
        kept = ids[start:][: max_length - 1]
        kept_prompt = ids[:start][-(max_length - len(kept)) :]
        assert cut.piece("input_ids", i).tolist() == kept_prompt + kept
        assert cut.piece("labels", i).tolist() == [-100] * len(kept_prompt) + kept
        assert len(kept_prompt) >= 1
    assert cut.truncated == sum(rows.lengths(np.arange(3)) > max_length)


def test_a_row_of_exactly_the_allowed_length_is_not_cut(task: Task, rows: EncodedRows):
    longest = int(rows.lengths(np.arange(3)).max())
    assert task.encode(frame(), Schema(), longest).truncated == 0
    assert task.encode(frame(), Schema(), longest - 1).truncated == 1


def test_the_separator_stands_between_prompt_and_completion(tiny_llama: Path):
    task = task_on(tiny_llama, "causal_lm", separator=" answer : ")
    rows = task.encode(frame(), Schema(), 64)
    assert task.tokenizer.decode(answer(rows, 1)) == "answer : none"


@pytest.mark.parametrize("empty", ["", " "])
@pytest.mark.parametrize("ends", [False, True])
def test_an_empty_completion_is_refused_with_its_row(task: Task, ending: Task, ends: bool, empty: str):
    with pytest.raises(InputError, match=r"Row 2 has no answer tokens.*data\.label"):
        (ending if ends else task).encode(frame(completions=["fine", empty, "fine"]), Schema(), 32)


def test_a_completion_may_be_a_number(task: Task):
    rows = task.encode(frame(completions=[1, 22, 333]), Schema(), 32)
    assert [task.tokenizer.decode(answer(rows, i)) for i in range(3)] == ["1", "22", "333"]


def test_metrics_weigh_every_answer_token_alike(task: Task):
    found = task.metrics({"loss": np.array([2.0, 10.0]), "tokens": np.array([1, 5]), "correct": np.array([1, 2])})
    assert found == pytest.approx({"token_accuracy": 0.5, "loss": 2.0, "perplexity": math.exp(2.0)})


def test_a_hopeless_model_has_a_finite_perplexity(task: Task):
    found = task.metrics({"loss": np.array([1e6]), "tokens": np.array([1]), "correct": np.array([0])})
    assert math.isfinite(found["perplexity"])


def test_there_is_no_schema_and_no_answer_without_a_model(task: Task, rows: EncodedRows):
    assert task.schema(frame()) == Schema()
    assert task.zero_shot(rows, np.array([0]), np.array([1])) is None


def test_an_encoder_is_refused(tiny_bert: Path):
    with pytest.raises(InputError, match="task=causal_lm needs a language model"):
        task_on(tiny_bert, "causal_lm").schema(frame())


def test_generation_continues_every_prompt_as_if_it_were_alone(ending: Task, model: nn.Module):
    """Greedy by hand, one token at a time, without padding."""
    prompts = [ending.tokenizer(text)["input_ids"] for text in PROMPTS]
    for prompt, found in zip(prompts, generate(model, ending.tokenizer, prompts, 4), strict=True):
        ids = list(prompt)
        for _ in range(4):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == ending.tokenizer.eos_token_id:
                ids.pop()
                break
        assert found == ids[len(prompt) :]


def test_a_sample_is_the_prompt_the_reference_and_what_the_model_writes(ending: Task, model: nn.Module):
    rows = ending.encode(frame(), Schema(), 64)
    found = ending.sample(model, rows, 0)
    assert found is not None
    assert found["prompt"] == PROMPTS[0]
    assert found["reference"] == COMPLETIONS[0]
    prompt = ending.tokenizer(PROMPTS[0])["input_ids"]
    written = generate(model, ending.tokenizer, [prompt], 64)[0]
    assert found["answer"] == ending.tokenizer.decode(written, skip_special_tokens=True).strip()


def test_the_last_of_several_answers_is_the_reference():
    ids, labels = np.arange(10, 18), np.array([-100, 11, 12, -100, -100, 15, 16, -100])
    assert split_last_answer(ids, labels) == ([10, 11, 12, 13, 14], [15, 16])
