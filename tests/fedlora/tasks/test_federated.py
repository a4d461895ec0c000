"""Every task through a whole run: data, clients, training, evaluation, plan and export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from transformers import AutoTokenizer

from fedlora.config import Config
from simulations.compose import compose_config
from simulations.plan import plan_run
from simulations.simulate import start
from tests.fedlora.tasks.helpers import task_on

ROWS, SITES = 60, 4
RUN = [
    "partition=natural", "data.client=site", "rounds=4", "cohort.size=3", "client.max_length=24", "client.lr=1e-2",
    "adapter.rank=4", "engine=loop", "engine.threads=1", "eval.every=4", "eval.max_rows=16",
]  # fmt: skip
VIT = "{image_size: 8, patch_size: 4, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}"
RNG = np.random.default_rng(0)
BRIGHT = RNG.integers(0, 2, ROWS)


def ratings(folder: Path) -> pd.DataFrame:
    good = RNG.integers(0, 5, ROWS)
    texts = [" ".join(RNG.permutation(["lovely"] * n + ["dull"] * (4 - n))) for n in good]
    return pd.DataFrame({"text": texts, "label": good / 4})


def names(folder: Path) -> pd.DataFrame:
    words = [[str(RNG.choice(["paris", "london", "was", "with"])) for _ in range(6)] for _ in range(ROWS)]
    tags = [["B-LOC" if word in ("paris", "london") else "O" for word in row] for row in words]
    return pd.DataFrame({"text": words, "label": tags})


def quiz(folder: Path) -> pd.DataFrame:
    word = RNG.choice(["lovely", "dull"], ROWS)
    return pd.DataFrame(
        {
            "text": [f"the film was {w} . so it is" for w in word],
            "choices": [["good", "bad"][: 2 + i % 2] + ["very long"] * (i % 2) for i in range(ROWS)],
            "label": ["A" if w == "lovely" else "B" for w in word],
        }
    )


def sums(folder: Path) -> pd.DataFrame:
    return pd.DataFrame({"text": ["what is it ?"] * ROWS, "label": ["7"] * ROWS})


def pictures(folder: Path) -> pd.DataFrame:
    for i, bright in enumerate(BRIGHT):
        noise = RNG.integers(0, 60, (10, 8, 3)) + 190 * bright
        Image.fromarray(noise.astype(np.uint8)).save(folder / f"{i}.png")
    return pd.DataFrame(
        {"image": [str(folder / f"{i}.png") for i in range(ROWS)], "label": np.where(BRIGHT, "day", "night")}
    )


TASKS: dict[str, tuple[Callable[[Path], pd.DataFrame], str, list[str], float]] = {
    "regression": (ratings, "tiny_bert", ["adapter.target_modules=[query,value]"], 0.5),
    "token_classification": (names, "tiny_bert", ["adapter.target_modules=[query,value]"], 0.9),
    "multiple_choice": (quiz, "tiny_llama", ["data.choices=choices"], 0.9),
    "generation": (
        sums,
        "tiny_llama",
        ["task.max_new_tokens=6", "task.chat=false", "client.local_epochs=4", "rounds=6"],
        0.9,
    ),
    "image_classification": (
        pictures,
        "random",
        ["backbone.architecture=vit", f"+backbone.settings={VIT}", "adapter.target_modules=[q_proj,v_proj]"],
        0.9,
    ),
}


@pytest.fixture
def compose(request: pytest.FixtureRequest, tmp_path: Path):
    """Compose a small run of a task on data made for it."""

    def build(task: str, *overrides: str) -> Config:
        make, model, more, _ = TASKS[task]
        rows = make(tmp_path).assign(site=[f"s{i % SITES}" for i in range(ROWS)])
        rows.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
        data = ["data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}"]
        backbone = [f"backbone={model}"]
        if model != "random":
            folder = request.getfixturevalue(model)
            AutoTokenizer.from_pretrained(folder, eos_token="[SEP]").save_pretrained(tmp_path / "tokenizer")
            backbone = ["backbone=hf", f"backbone.path={folder}", f"++backbone.tokenizer={tmp_path / 'tokenizer'}"]
        return compose_config([f"task={task}", *backbone, *data, *RUN, *more, *overrides])

    return build


@pytest.mark.parametrize("task", TASKS)
def test_a_federation_learns_the_task(compose, tmp_path: Path, task: str):
    summary = start(compose(task), tmp_path / "run")
    metric = summary["main_metric"]
    assert summary["final"]["metrics"][f"validation_{metric}"] > TASKS[task][3], summary["final"]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("task", TASKS)
def test_a_plan_needs_no_weights(compose, task: str):
    assert plan_run(compose(task))["total_bytes"] > 0


@pytest.mark.parametrize("task", TASKS)
def test_zero_shot_evaluates_every_task(compose, tmp_path: Path, task: str):
    summary = start(compose(task, "method=zero_shot"), tmp_path / "run")
    assert np.isfinite(list(summary["final"]["metrics"].values())).all()


@pytest.mark.parametrize("task", [*TASKS, "causal_lm", "classification"])
def test_the_configuration_lists_every_setting_with_its_default(tiny_llama: Path, task: str):
    listed = compose_config([f"task={task}", "backbone=hf", f"backbone.path={tiny_llama}"]).task
    defaults = task_on(tiny_llama, task).config.model_dump(mode="json")
    assert listed == defaults
