"""One word, ``data=gsm8k``, chooses source, columns, task, partition and backbone; everything can be overridden.

Every test writes a few rows with the columns and types that the data set has on the hub.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, Features
from PIL import Image

from fedlora.config import Config
from fedlora.data.sources import load_rows
from fedlora.federation import Federation
from fedlora.tasks.base import IGNORED
from simulations.compose import CONF, compose_config

Row = dict[str, Any]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:"
)


@dataclass(frozen=True)
class Expected:
    """What a preset must make of rows shaped like its data set.

    Attributes:
        rows: row ``n`` as on the hub.
        text: the text of row 0 after the preset's template, or both texts.
        label: the label of row 0, a class, a number, an answer or the number of a choice.
        task: the name of the task.
        metric: its main metric.
        partition: the default partition.
        folder: where in the repository the files lie.
        classes: names of ``label`` where it is a ClassLabel.
        kept: how many of 40 rows the preset keeps.
    """

    rows: Callable[[int], Row]
    text: str | tuple[str, str]
    label: Any
    task: str = "classification"
    metric: str = "accuracy"
    partition: str = "dirichlet"
    folder: str = "."
    classes: tuple[str, ...] = ()
    kept: int = 40


def pair(first: str, second: str, classes: int) -> Callable[[int], Row]:
    return lambda n: {first: f"first {n}", second: f"second {n}", "label": n % classes, "idx": n}


PRESETS = {
    "sst2": Expected(
        lambda n: {"sentence": f"a film number {n}", "label": n % 2, "idx": n},
        "a film number 0", "0", folder="sst2", classes=("negative", "positive"),
    ),
    "mnli": Expected(
        pair("premise", "hypothesis", 3), ("first 0", "second 0"), "0",
        folder="mnli", classes=("entailment", "neutral", "contradiction"),
    ),
    "qqp": Expected(
        pair("question1", "question2", 2), ("first 0", "second 0"), "0",
        metric="f1", folder="qqp", classes=("not_duplicate", "duplicate"),
    ),
    "qnli": Expected(
        pair("question", "sentence", 2), ("first 0", "second 0"), "0",
        folder="qnli", classes=("entailment", "not_entailment"),
    ),
    "rte": Expected(
        pair("sentence1", "sentence2", 2), ("first 0", "second 0"), "0",
        partition="iid", folder="rte", classes=("entailment", "not_entailment"),
    ),
    "stsb": Expected(
        lambda n: {"sentence1": f"first {n}", "sentence2": f"second {n}", "label": 0.2 + n / 10, "idx": n},
        ("first 0", "second 0"), 0.2, task="regression", metric="spearman", partition="iid", folder="stsb",
    ),
    "snli": Expected(
        lambda n: {"premise": f"first {n}", "hypothesis": f"second {n}", "label": n % 4 if n % 4 < 3 else -1},
        ("first 0", "second 0"), "0", classes=("entailment", "neutral", "contradiction"), kept=30,
    ),
    "newsgroups": Expected(
        lambda n: {"text": "" if n % 8 == 7 else f"post {n}", "label": n % 3,
                   "label_text": ("comp.graphics", "sci.space", "rec.autos")[n % 3]},
        "post 0", "comp.graphics", kept=35,
    ),
    "fpb": Expected(
        lambda n: {"sentence": f"Profit rose to EUR {n} mn .", "label": n % 3},
        "Profit rose to EUR 0 mn .", "0", classes=("negative", "neutral", "positive"),
    ),
    "gsm8k": Expected(
        lambda n: {"question": f"What is {n} plus 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"},
        "Question: What is 0 plus 1?\nAnswer:", "0 + 1 = <<0+1=1>>1\n#### 1",
        task="generation", metric="exact_match", partition="iid", folder="main",
    ),
    "metamathqa": Expected(
        lambda n: {"type": "GSM_Rephrased", "query": f"What is {n} plus 1?", "original_question": f"{n} and 1?",
                   "response": f"We add. #### {n + 1}\nThe answer is: {n + 1}"},
        ALPACA.format("What is 0 plus 1?") + " Let's think step by step.", "We add. #### 1\nThe answer is: 1",
        task="generation", metric="exact_match", partition="iid",
    ),
    "commonsense170k": Expected(
        lambda n: {"instruction": f"Is {n} even?", "input": "", "output": "the correct answer is true",
                   "answer": "true"},
        ALPACA.format("Is 0 even?"), "the correct answer is true",
        task="generation", metric="exact_match", partition="iid",
    ),
    "dolly": Expected(
        lambda n: {"instruction": f"Say {n}.", "context": f"about {n}" if n % 2 == 0 else "", "response": f"{n}!",
                   "category": f"kind {n % 8}"},
        ALPACA_WITH_INPUT.format("Say 0.", "about 0"), "0!",
        task="causal_lm", metric="token_accuracy", partition="natural",
    ),
    "alpaca_gpt4": Expected(
        lambda n: {"instruction": f"Say {n}.", "input": "", "output": "" if n == 39 else f"{n}!", "text": "whole"},
        ALPACA.format("Say 0."), "0!", task="causal_lm", metric="token_accuracy", partition="iid", kept=39,
    ),
    "medqa": Expected(
        lambda n: {"question": f"Which drug, case {n}?", "answer": "beta", "answer_idx": "B", "meta_info": "step1",
                   "options": {"A": "alpha", "B": "beta", "C": "gamma", "D": "delta"}, "metamap_phrases": ["drug"]},
        "Question: Which drug, case 0?\nA. alpha\nB. beta\nC. gamma\nD. delta\nAnswer:", 1,
        task="multiple_choice", partition="iid",
    ),
    "pubmedqa": Expected(
        lambda n: {"pubid": n, "question": f"Does {n} help?", "long_answer": "It does not.",
                   "context": {"contexts": ["We asked.", "We saw."], "labels": ["AIM", "RESULT"], "meshes": ["Humans"]},
                   "final_decision": ("no", "yes", "maybe")[n % 3]},
        "Abstract: We asked.\nWe saw.\nQuestion: Does 0 help?\nAnswer:", 1,
        task="multiple_choice", partition="iid", folder="pqa_labeled",
    ),
}  # fmt: skip
VIT = [
    "backbone=random", "backbone.architecture=vit", "backbone.settings.image_size=8", "backbone.settings.patch_size=4",
    "backbone.settings.num_channels=1", "backbone.settings.hidden_size=16", "backbone.settings.num_hidden_layers=1",
    "backbone.settings.num_attention_heads=2", "backbone.settings.intermediate_size=32",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def copy_of(name: str, folder: Path) -> Path:
    """A folder like a local copy of the hub repository, with 40 rows in Parquet."""
    expected = PRESETS[name]
    table = Dataset.from_list([expected.rows(n) for n in range(40)])
    if expected.classes:
        table = table.cast(Features({**table.features, "label": ClassLabel(names=list(expected.classes))}))
    (folder / expected.folder).mkdir(exist_ok=True)
    table.to_parquet(folder / expected.folder / "train-00000-of-00001.parquet")
    table.to_parquet(folder / expected.folder / "test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def compose(tiny_bert: Path, tiny_llama: Path, tmp_path: Path) -> Callable[..., Config]:
    """The preset on its local copy with a tiny backbone and a handful of clients."""

    def composed(name: str, *overrides: str) -> Config:
        expected = PRESETS[name]
        lm = expected.task in ("causal_lm", "generation", "multiple_choice")
        clients = [] if expected.partition == "natural" else ["partition.clients=6"]
        clients += ["partition.alpha=100", "partition.min_rows=1"] if expected.partition == "dirichlet" else []
        return compose_config([
            f"data={name}", f"data.path={copy_of(name, tmp_path)}", "backbone=hf",
            f"backbone.path={tiny_llama if lm else tiny_bert}", "data.split.public_rows=4", "cohort.size=2", *clients,
            *overrides,
        ])  # fmt: skip

    return composed


def test_every_preset_is_tested() -> None:
    chosen = {path.stem for path in (CONF / "data").glob("*.yaml") if "hf@data" in path.read_text()}
    assert chosen == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_turns_the_columns_of_its_data_set_into_tokens(name: str, compose: Callable[..., Config]) -> None:
    expected = PRESETS[name]
    federation = Federation(compose(name))
    config, task, rows = federation.config, federation.task, federation.rows
    assert (task.name, task.main_metric, config.partition.name) == (expected.task, expected.metric, expected.partition)
    table = load_rows(config.data, task.columns, task.nested)
    texts = [table[column][0] for column in ("text", "text_pair") if column in table]
    assert tuple(texts) == (expected.text if isinstance(expected.text, tuple) else (expected.text,))
    assert (len(table), table.attrs["left_out"]) == (expected.kept, 40 - expected.kept)
    ids = rows.piece("input_ids", 0)
    tokenizer: Any = task.tokenizer
    if task.name in ("classification", "regression"):
        assert ids.tolist() == tokenizer(*texts)["input_ids"]
        target = rows.fixed["target"][0]
        assert (federation.schema.labels[target] if federation.schema.labels else target) == pytest.approx(
            expected.label
        )
        return
    prompt = tokenizer(texts[0])["input_ids"]
    assert ids[: len(prompt)].tolist() == prompt
    if task.name == "multiple_choice":
        assert rows.fixed["target"][0] == expected.label
        return
    labels = rows.piece("labels", 0)
    answer = tokenizer(expected.label, add_special_tokens=False)["input_ids"]
    assert labels[labels != IGNORED].tolist()[: len(answer)] == answer
    assert len(ids) == len(prompt) + (labels != IGNORED).sum()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_its_hub_data_set_and_a_length_that_its_backbone_reads(name: str) -> None:
    config = compose_config([f"data={name}"])
    assert config.data.name == "hf"
    assert config.data.path is not None
    assert "/" in config.data.path
    lm = PRESETS[name].task in ("causal_lm", "generation", "multiple_choice")
    assert config.backbone.name == ("smollm2" if lm else "minilm")
    assert 64 <= config.client.max_length <= 512
    assert config.data.split.public_rows == 128  # so that every method works with one word


@pytest.mark.parametrize("name", [*PRESETS, "chatterbot"])
def test_every_choice_of_a_preset_can_be_overridden_in_any_order(name: str) -> None:
    overrides = [
        "task=causal_lm", "backbone=hf", "partition=exponential", "data.path=mine", "data.text=words",
        "client.max_length=17", "cohort.size=3", "data.split.public_rows=5", "run_dir=here",
    ]  # fmt: skip
    config = compose_config([*overrides, f"data={name}"])
    assert config == compose_config([f"data={name}", *overrides])
    assert (config.task["name"], config.backbone.name, config.partition.name) == ("causal_lm", "hf", "exponential")
    assert (config.data.path, config.data.text, config.data.split.public_rows) == ("mine", "words", 5)
    assert (config.client.max_length, config.cohort.size) == (17, 3)


def test_a_preset_of_another_task_leaves_no_setting_behind(compose: Callable[..., Config]) -> None:
    for name in ("qqp", "gsm8k"):
        config = compose(name, "task=causal_lm", "data.label='{{ label or answer }}'" if name == "gsm8k" else "seed=1")
        assert set(config.task) == set(compose_config(["task=causal_lm"]).task)


def test_methods_and_experiments_compose_with_presets() -> None:
    swept = compose_config(["experiment=demo", "data=chatterbot", "method=ffa"])
    assert (swept.data.name, swept.task["name"], swept.method) == ("chatterbot", "causal_lm", "ffa")
    assert (swept.rounds, swept.cohort.size, swept.client.max_length) == (12, 4, 96)


def test_chatterbot_makes_clients_of_topics(tiny_llama: Path) -> None:
    config = compose_config(["data=chatterbot", "backbone=hf", f"backbone.path={tiny_llama}"])
    federation = Federation(config)
    assert federation.index.left_out_clients == 1
    assert len(federation.index.unseen) == 4
    assert len(federation.index.public) == 48
    assert set(federation.clients) < set(load_rows(config.data)["client"])
    assert federation.rows.truncated < 0.1 * len(federation.rows)


def test_rows_of_a_file_serve_a_preset_too(tmp_path: Path, tiny_llama: Path) -> None:
    rows = pd.DataFrame([PRESETS["dolly"].rows(n) for n in range(40)])
    rows.to_csv(tmp_path / "rows.csv", index=False)
    rows.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    lengths = []
    for file in ("rows.csv", "rows.jsonl"):
        config = compose_config(
            ["data=dolly", f"data.path={tmp_path / file}", "backbone=hf", f"backbone.path={tiny_llama}",
             "data.split.public_rows=2"]
        )  # fmt: skip
        lengths.append(Federation(config).rows.lengths(np.arange(40)).tolist())
    assert lengths[0] == lengths[1]


@pytest.mark.parametrize(("name", "count", "shared_pixels"), [("digits", 1797, True), ("mnist", 5000, False)])
def test_pictures_become_pixels_of_the_size_that_the_model_reads(name: str, count: int, shared_pixels: bool) -> None:
    config = compose_config([f"data={name}", *VIT])
    federation = Federation(config)
    assert (federation.task.name, config.partition.name) == ("image_classification", "dirichlet")
    assert federation.rows.fixed["pixels"].shape == (count, 1, 8, 8)
    assert federation.schema.labels == tuple("0123456789")
    source = load_rows(config.data, federation.task.columns, federation.task.nested)["image"][0]
    assert (source.shape == (8, 8)) == shared_pixels
    if shared_pixels:
        assert (federation.rows.fixed["pixels"][0, 0] == source).all()


def test_a_folder_of_pictures_is_one_word_and_its_clients_another(tmp_path: Path) -> None:
    for site in ("north", "south", "east", "west"):
        for label in ("cat", "dog"):
            for number in range(4):
                path = tmp_path / site / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((9, 5), 10 * number, dtype=np.uint8)).save(path)
    folder = ["data=imagefolder", f"data.path={tmp_path}", "cohort.size=2", *VIT]
    natural = Federation(compose_config([*folder, "data.client=client", "partition=natural"]))
    assert set(natural.clients) | set(natural.index.unseen) == {"north", "south", "east", "west"}
    assert natural.schema.labels == ("cat", "dog")
    drawn = Federation(compose_config([*folder, "partition.clients=4"]))
    assert drawn.rows.fixed["pixels"].shape == (32, 1, 8, 8)
