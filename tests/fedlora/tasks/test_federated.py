"""Every task through a whole run: data, clients, training, evaluation and export."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from simulations.compose import compose_config
from simulations.simulate import start


def test_a_federation_learns_a_number(tiny_bert: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    good = rng.integers(0, 5, 60)
    texts = [" ".join(rng.permutation(["lovely"] * n + ["dull"] * (4 - n))) for n in good]
    path = tmp_path / "ratings.csv"
    pd.DataFrame({"text": texts, "label": good / 4, "site": [f"s{i % 4}" for i in range(60)]}).to_csv(path, index=False)
    config = compose_config(
        [
            "task=regression", "backbone=hf", f"backbone.path={tiny_bert}", "data=csv", f"data.path={path}",
            "data.client=site", "rounds=4", "cohort.size=3", "client.max_length=16", "client.lr=1e-2",
            "adapter.rank=4", "engine=loop", "engine.threads=1", "eval.every=4",
        ]
    )  # fmt: skip
    summary = start(config, tmp_path / "run")
    assert summary["main_metric"] == "spearman"
    assert summary["final"]["metrics"]["validation_spearman"] > 0.5
