from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.tasks import Batch, Schema, build_task, collate
from tests.fedlora.helpers import random_state

TASK = build_task("causal_lm")
PROMPTS = ["what is 3 plus 4 ?", "name a very lovely film with a superb plot", "hello"]
COMPLETIONS = ["7 of course", "none", "the film was a great and moving one"]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def ending_tokenizer(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama, eos_token="[SEP]")


def frame(prompts: list[str] = PROMPTS, completions: list = COMPLETIONS) -> pd.DataFrame:
    return pd.DataFrame({"text": prompts, "label": completions})


@pytest.fixture
def trained(tiny_lm, tokenizer):
    """A model far from its start, and three rows of unequal length for it."""
    federation = Federation(tiny_lm())
    model = federation.build_model()
    model.load(random_state(model, model.shared))
    tokens = TASK.encode(tokenizer, frame(), Schema(), 64)
    return model, tokens, collate(tokens, [0, 1, 2], tokenizer.pad_token_id)


def labels_of(batch: Batch) -> torch.Tensor:
    """What a user of transformers would write: -100 on the prompt and on the padding."""
    labels = batch["input_ids"].clone()
    position = torch.arange(labels.shape[1])
    labels[position < batch["target"][:, None]] = -100
    labels[batch["attention_mask"] == 0] = -100
    return labels


def test_the_loss_is_transformers_own_with_the_prompt_masked(trained):
    model, _, batch = trained
    assert (batch["attention_mask"] == 0).any()  # rows of unequal length
    expected = model.module(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels_of(batch)
    ).loss
    torch.testing.assert_close(TASK.loss(model.module, batch), expected)


def test_every_completion_token_counts_and_no_prompt_token_does(trained):
    model, _, batch = trained
    with torch.no_grad():
        found = TASK.statistics(model.module, batch)
        logits = model.module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    for row in range(len(batch["target"])):
        start, end = int(batch["target"][row]), int(batch["attention_mask"][row].sum())
        targets = batch["input_ids"][row, start:end]
        scores = logits[row, start - 1 : end - 1]
        loss = torch.nn.functional.cross_entropy(scores, targets, reduction="sum")
        assert found["tokens"][row] == end - start
        assert found["loss"][row] == pytest.approx(loss.item(), rel=1e-5)
        assert found["correct"][row] == int((scores.argmax(1) == targets).sum())


def test_what_the_prompt_is_predicted_to_be_has_no_effect(trained):
    """Gradients reach no logit at a position that predicts a prompt token or padding."""
    model, _, batch = trained
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output) -> None:
        output.logits.retain_grad()
        kept.append(output.logits)

    hook = model.module.register_forward_hook(keep)
    TASK.loss(model.module, batch).backward()
    hook.remove()
    moved = kept[0].grad.abs().sum(-1) > 0
    position = torch.arange(moved.shape[1])
    lengths = batch["attention_mask"].sum(1)
    predicts = (position >= batch["target"][:, None] - 1) & (position < lengths[:, None] - 1)
    assert torch.equal(moved, predicts)


def test_the_loss_does_not_depend_on_padding(trained):
    model, tokens, _ = trained
    short = int(tokens.lengths(np.arange(3)).argmin())
    with torch.no_grad():
        alone = TASK.statistics(model.module, collate(tokens, [short], 0))
        beside = TASK.statistics(model.module, collate(tokens, [short, (short + 1) % 3], 0))
    assert beside["loss"][0] == pytest.approx(alone["loss"][0], rel=1e-5)
    assert beside["tokens"][0] == alone["tokens"][0]


def test_a_row_is_prompt_then_completion_then_end(ending_tokenizer):
    tokenizer = ending_tokenizer
    rows = TASK.encode(tokenizer, frame(), Schema(), 64)
    for i, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        head = tokenizer(prompt)["input_ids"]
        answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
        assert rows.ids(i).tolist() == [*head, *answer, tokenizer.eos_token_id]
        assert rows.targets[i] == len(head)
    assert rows.truncated == 0
    assert rows.segments is None


@pytest.mark.parametrize("max_length", [4, 6, 9])
def test_truncation_keeps_the_completion_and_cuts_the_prompt_from_its_left(tokenizer, max_length: int):
    full = TASK.encode(tokenizer, frame(), Schema(), 64)
    cut = TASK.encode(tokenizer, frame(), Schema(), max_length)
    for i in range(len(PROMPTS)):
        start, ids = int(full.targets[i]), full.ids(i).tolist()
        answer = ids[start:][: max_length - 1]
        kept_prompt = ids[:start][-(max_length - len(answer)) :]
        assert cut.ids(i).tolist() == kept_prompt + answer
        assert cut.targets[i] == len(kept_prompt) >= 1
        assert len(cut.ids(i)) <= max_length
    expected = sum(len(full.ids(i)) > max_length for i in range(3))
    assert cut.truncated == expected


def test_an_empty_completion_is_refused_with_its_row(tokenizer):
    assert tokenizer.eos_token_id is None
    with pytest.raises(InputError, match=r"Row 1 has an empty completion \(data\.label\)"):
        TASK.encode(tokenizer, frame(completions=["fine", "", "fine"]), Schema(), 32)


def test_a_completion_may_be_a_number(tokenizer):
    rows = TASK.encode(tokenizer, frame(completions=[1, 22, 333]), Schema(), 32)
    answers = [tokenizer.decode(rows.ids(i)[rows.targets[i] :]) for i in range(3)]
    assert answers == ["1", "22", "333"]


def test_metrics_weigh_every_completion_token_alike():
    found = TASK.metrics({"loss": np.array([2.0, 10.0]), "tokens": np.array([1, 5]), "correct": np.array([1, 2])})
    assert found == pytest.approx({"token_accuracy": 0.5, "loss": 2.0, "perplexity": math.exp(2.0)})


def test_a_hopeless_model_has_a_finite_perplexity():
    found = TASK.metrics({"loss": np.array([1e6]), "tokens": np.array([1]), "correct": np.array([0])})
    assert math.isfinite(found["perplexity"])


def test_there_is_no_schema_and_no_answer_without_a_model():
    assert TASK.schema(frame()) == Schema()
    assert TASK.zero_shot(np.array([1]), np.array([1])) is None
