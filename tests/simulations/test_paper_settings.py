"""The settings of the Fed-SB paper (arXiv 2502.15436) and its communicated parameters, to the integer.

The architectures have their true dimensions and live on the meta device; the rows are a handful with the right columns.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import yaml

from fedlora.config import Config
from fedlora.federation import Federation
from simulations.compose import CONF, compose_config
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
def compose(rows: dict[str, Path], tiny_bert: Path) -> Callable[..., Config]:
    """``experiment=...`` with the architecture instead of the hub model, and a handful of rows."""

    def composed(experiment: str, *overrides: str) -> Config:
        architecture, settings = EXPERIMENTS[experiment]
        return compose_config([
            f"experiment={experiment}", f"data.path={rows[experiment]}", "data.split.public_rows=2",
            "backbone=random", f"backbone.architecture={architecture}",
            *(f"backbone.settings.{key}={value}" for key, value in settings.items()),
            f"backbone.tokenizer={tiny_bert}", *overrides,
        ])  # fmt: skip

    return composed


FED_SB = [
    ("fed_sb_arithmetic_mistral", 25, 224, (120, 160, 200), (3_225_600, 5_734_400, 8_960_000)),
    ("fed_sb_arithmetic_gemma", 25, 294, (120, 160, 200), (4_233_600, 7_526_400, 11_760_000)),
    ("fed_sb_commonsense", 5, 196, (120, 160, 200), (2_822_400, 5_017_600, 7_840_000)),
    ("fed_sb_snli", 3, 24, (32, 48, 64), (26_883, 57_603, 100_611)),
]
BASELINES = [
    ("fed_sb_arithmetic_mistral", "fedit", 83_886_080),
    ("fed_sb_arithmetic_mistral", "ffa", 44_040_192),
    ("fed_sb_arithmetic_gemma", "fedit", 108_036_096),
    ("fed_sb_arithmetic_gemma", "ffa", 59_179_008),
    ("fed_sb_commonsense", "fedit", 48_627_712),
    ("fed_sb_commonsense", "ffa", 24_772_608),
    ("fed_sb_snli", "fedit", 1_179_648 + HEAD),
    ("fed_sb_snli", "ffa", 589_824 + HEAD),
]


def shared(config: Config) -> int:
    """The parameters that a client sends, from the shapes alone."""
    model = Federation(config).build_meta_model()
    return sum(prod(shape) for shape in model.shapes(model.shared).values())


@pytest.mark.parametrize(("experiment", "clients", "modules", "ranks", "uploads"), FED_SB)
def test_fed_sb_shares_one_square_a_module_and_the_head(
    experiment: str,
    clients: int,
    modules: int,
    ranks: tuple[int, ...],
    uploads: tuple[int, ...],
    compose: Callable[..., Config],
) -> None:
    head = HEAD if experiment == "fed_sb_snli" else 0
    assert uploads == tuple(modules * rank**2 + head for rank in ranks)
    assert len(Federation(compose(experiment)).clients) == clients
    assert uploads == tuple(shared(compose(experiment, f"adapter.rank={rank}")) for rank in ranks)


@pytest.mark.parametrize(("experiment", "method", "upload"), BASELINES)
def test_baselines_of_rank_32_share_what_the_paper_counts(
    experiment: str, method: str, upload: int, compose: Callable[..., Config]
) -> None:
    assert shared(compose(experiment, f"method={method}", "adapter.rank=32", "adapter.alpha=16")) == upload


@pytest.mark.parametrize(
    ("experiment", "clients", "rank", "upload", "setup"),
    [
        ("fed_sb_snli", 3, 64, 100_611, 64 * 36_864),
        ("fed_sb_arithmetic_mistral", 25, 200, 8_960_000, 524_288_000),
        pytest.param("fed_sb_arithmetic_gemma", 25, 200, 11_760_000, 200 * 3_376_128, marks=pytest.mark.slow),
        pytest.param("fed_sb_commonsense", 5, 200, 7_840_000, 200 * 54_272 * 28, marks=pytest.mark.slow),
    ],
)
def test_the_plan_has_the_clients_of_the_paper_its_uploads_and_the_basis_sent_once(
    experiment: str, clients: int, rank: int, upload: int, setup: int, compose: Callable[..., Config]
) -> None:
    planned = plan_run(compose(experiment, f"adapter.rank={rank}"))
    assert planned["label"] == "fed_sb[gradient]"
    assert (planned["clients_per_round"], planned["rounds"]) == (clients, 1)
    assert planned["upload_params"] == planned["download_params"] == planned["trainable_params"] == upload
    assert planned["setup_params"] == setup
    assert planned["setup_bytes"] == 4 * clients * setup


BUDGETS = [
    ("fedit", 32, 64),
    ("fedex", 32, 64),
    ("ffa", 64, 128),
    ("fed_sb", 221, 313),
    ("ravan", 110, 156),
]


@pytest.mark.parametrize(("method", "low", "high"), BUDGETS)
def test_the_ranks_of_ravans_tables_have_equal_budgets(
    method: str, low: int, high: int, compose: Callable[..., Config]
) -> None:
    """RAVAN (arXiv 2506.05568), query and value of 768 x 768; its own rank is that of each of 4 heads."""
    for rank, lora in ((low, 32), (high, 64)):
        found = shared(compose("fed_sb_snli", f"method={method}", f"adapter.rank={rank}", "adapter.head=frozen"))
        assert found == pytest.approx(24 * lora * (768 + 768), rel=0.02)


def sweep(experiment: str) -> dict[str, dict[str, Any]]:
    """The plan of every method that an experiment compares and that sends something."""
    values = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text())
    methods = values["hydra"]["sweeper"]["params"]["method"].split(",")
    plans = {method: plan_run(compose_config([f"experiment={experiment}", f"method={method}"])) for method in methods}
    return {method: planned for method, planned in plans.items() if planned["upload_params"]}


@pytest.mark.parametrize(("experiment", "methods"), [("matched_budget", 5), ("compare", 6)])
def test_methods_of_matched_budget_train_as_many_numbers_as_lora_of_rank_8(experiment: str, methods: int) -> None:
    plans = sweep(experiment)
    assert len(plans) == methods
    lora = plans["fedit"]["trainable_params"]
    assert lora == 12 * 8 * (384 + 384) + 384 * 2 + 2
    for method, planned in plans.items():
        assert planned["trainable_params"] == pytest.approx(lora, rel=0.01), method
        assert planned["upload_params"] == pytest.approx(lora, rel=0.01), method


@pytest.mark.parametrize(("experiment", "methods"), [("matched_bytes", 4), ("compare_bytes", 5)])
def test_methods_of_matched_bytes_send_as_much_as_fedit_of_rank_8_in_the_whole_run(
    experiment: str, methods: int
) -> None:
    sizes = {
        method: planned["payload_up"] + planned["payload_down"] + planned["setup_bytes"]
        for method, planned in sweep(experiment).items()
    }
    assert len(sizes) == methods
    for method, size in sizes.items():
        assert size == pytest.approx(sizes["fedit"], rel=0.03), method


def test_other_bases_and_baselines_send_nothing_in_advance(compose: Callable[..., Config]) -> None:
    for overrides in (["adapter.basis=weight"], ["method=ffa", "adapter.rank=32", "adapter.alpha=32"]):
        assert plan_run(compose("fed_sb_snli", *overrides))["setup_params"] == 0


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
