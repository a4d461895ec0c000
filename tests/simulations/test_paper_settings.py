"""The settings of the Fed-SB paper (arXiv 2502.15436) and its communicated parameters, to the integer.

The architectures have their true dimensions and live on the meta device; the rows are a handful with the right columns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from simulations.compose import compose_config
from simulations.plan import plan_run

MISTRAL = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
GEMMA = {
    "vocab_size": 256000, "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
}  # fmt: skip
LLAMA = {
    "vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
    "num_attention_heads": 24, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip
BERT = {"vocab_size": 28996}  # everything else is the default of the architecture

EXPERIMENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fed_sb_arithmetic_mistral": ("mistral", MISTRAL),
    "fed_sb_arithmetic_gemma": ("gemma2", GEMMA),
    "fed_sb_commonsense": ("llama", LLAMA),
    "fed_sb_snli": ("bert", BERT),
}
HEAD = 768 * 3 + 3
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Plan = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """108 rows for each data set, enough for the 27 clients of the largest federation."""
    made = {
        "metamathqa": {"query": "1 + 1?", "response": "The answer is: 2", "type": "GSM_Rephrased"},
        "commonsense170k": {"instruction": "True?", "input": "", "output": "the correct answer is true"},
        "snli": {"premise": "A man sleeps.", "hypothesis": "He rests."},
    }
    folder = tmp_path_factory.mktemp("rows")
    for name, row in made.items():
        table = pd.DataFrame([{**row, "label": n % 3} for n in range(108)])
        table.to_json(folder / f"{name}.jsonl", orient="records", lines=True)
    names = ("metamathqa", "metamathqa", "commonsense170k", "snli")
    return {experiment: folder / f"{name}.jsonl" for experiment, name in zip(EXPERIMENTS, names, strict=True)}


@pytest.fixture
def plan(rows: dict[str, Path], tiny_bert: Path) -> Plan:
    """``fedlora plan experiment=...`` with the architecture instead of the hub model."""

    def planned(experiment: str, *overrides: str) -> dict[str, Any]:
        architecture, settings = EXPERIMENTS[experiment]
        return plan_run(compose_config([
            f"experiment={experiment}", f"data.path={rows[experiment]}", "data.split.public_rows=2",
            "backbone=random", f"backbone.architecture={architecture}",
            *(f"backbone.settings.{key}={value}" for key, value in settings.items()),
            f"backbone.tokenizer={tiny_bert}", *overrides,
        ]))  # fmt: skip

    return planned


@pytest.mark.parametrize(
    ("experiment", "clients", "modules", "ranks", "uploads"),
    [
        ("fed_sb_arithmetic_mistral", 25, 224, (120, 160, 200), (3_225_600, 5_734_400, 8_960_000)),
        ("fed_sb_arithmetic_gemma", 25, 294, (120, 160, 200), (4_233_600, 7_526_400, 11_760_000)),
        ("fed_sb_commonsense", 5, 196, (120, 160, 200), (2_822_400, 5_017_600, 7_840_000)),
        ("fed_sb_snli", 3, 24, (32, 48, 64), (26_883, 57_603, 100_611)),
    ],
)
def test_fed_sb_uploads_one_square_a_module_and_the_head_of_every_client_in_one_round(
    experiment: str, clients: int, modules: int, ranks: tuple[int, ...], uploads: tuple[int, ...], plan: Plan
) -> None:
    head = HEAD if experiment == "fed_sb_snli" else 0
    assert uploads == tuple(modules * rank**2 + head for rank in ranks)
    for rank, upload in zip(ranks, uploads, strict=True):
        planned = plan(experiment, f"adapter.rank={rank}")
        assert planned["upload_params"] == planned["download_params"] == planned["trainable_params"] == upload
        assert (planned["clients_per_round"], planned["rounds"]) == (clients, 1)


@pytest.mark.parametrize(
    ("experiment", "method", "upload"),
    [
        ("fed_sb_arithmetic_mistral", "fedit", 83_886_080),
        ("fed_sb_arithmetic_mistral", "ffa", 44_040_192),
        ("fed_sb_arithmetic_gemma", "fedit", 108_036_096),
        ("fed_sb_arithmetic_gemma", "ffa", 59_179_008),
        ("fed_sb_commonsense", "fedit", 48_627_712),
        ("fed_sb_commonsense", "ffa", 24_772_608),
        ("fed_sb_snli", "fedit", 1_179_648 + HEAD),
        ("fed_sb_snli", "ffa", 589_824 + HEAD),
    ],
)
def test_baselines_of_rank_32_upload_what_the_paper_counts(
    experiment: str, method: str, upload: int, plan: Plan
) -> None:
    planned = plan(experiment, f"method={method}", "adapter.rank=32", "adapter.alpha=16")
    assert planned["upload_params"] == upload
    assert planned["setup_params"] == 0


def test_the_gradient_basis_is_sent_once_and_the_others_not_at_all(plan: Plan) -> None:
    broadcast = plan("fed_sb_arithmetic_mistral", "adapter.rank=200")
    assert broadcast["setup_params"] == 200 * 2_621_440 == 524_288_000
    assert broadcast["label"] == "fed_sb[gradient]"
    assert plan("fed_sb_snli", "adapter.basis=weight")["setup_params"] == 0


@pytest.mark.parametrize(
    ("experiment", "model", "lr", "schedule", "warmup", "batch", "epochs", "length", "targets"),
    [
        ("fed_sb_arithmetic_mistral", "mistralai/Mistral-7B-v0.1", 1e-4, "cosine", 0.02, (1, 32), 1, 512, ALL_LINEAR),
        ("fed_sb_arithmetic_gemma", "google/gemma-2-9b", 1e-4, "cosine", 0.02, (1, 32), 1, 512, ALL_LINEAR),
        ("fed_sb_commonsense", "meta-llama/Llama-3.2-3B", 1e-4, "linear", 0.02, (8, 24), 2, 256, ALL_LINEAR),
        ("fed_sb_snli", "google-bert/bert-base-cased", 5e-4, "constant", 0.0, (32, 1), 6, 128, ["query", "value"]),
    ],
)
def test_the_settings_are_those_of_the_paper(
    experiment: str,
    model: str,
    lr: float,
    schedule: str,
    warmup: float,
    batch: tuple[int, int],
    epochs: int,
    length: int,
    targets: list[str],
) -> None:
    config = compose_config([f"experiment={experiment}"])
    assert (config.backbone.name, config.backbone.path, config.method) == ("hf", model, "fed_sb")
    client = config.client
    assert (client.optimizer, client.lr, client.schedule, client.warmup) == ("adamw", lr, schedule, warmup)
    assert ((client.batch_size, client.grad_accumulation), client.local_epochs, client.max_length) == (
        batch,
        epochs,
        length,
    )
    assert config.adapter["target_modules"] == targets
    assert config.adapter["alpha"] == config.adapter["rank"]
    assert compose_config([f"experiment={experiment}", "adapter.rank=48"]).adapter["alpha"] == 48
