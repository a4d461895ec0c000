"""A task that a user writes in one short file, of a kind that fedlora does not have, through a whole run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from fedlora.config import Config
from simulations.compose import compose_config
from simulations.plan import plan_run
from simulations.simulate import start

PLUGIN = Path(__file__).parents[2] / "plugins" / "segmentation.py"
SEGFORMER = (
    "{depths: [1, 1, 1, 1], hidden_sizes: [8, 16, 16, 16], num_attention_heads: [1, 1, 1, 1], decoder_hidden_size: 16, "
    "sr_ratios: [1, 1, 1, 1]}"
)


def cells(folder: Path, pictures: int = 40) -> Path:
    """Grey pictures of one bright square each, and where it is."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(pictures):
        mask = np.zeros((32, 32), dtype=int)
        top, left = rng.integers(0, 16, 2)
        mask[top : top + 16, left : left + 16] = 1
        rows.append({"image": (rng.integers(0, 60, (32, 32)) + 190 * mask).tolist(), "label": mask.tolist()})
    path = folder / "cells.jsonl"
    frame = pd.DataFrame(rows).assign(hospital=[f"h{i % 4}" for i in range(pictures)])
    frame.to_json(path, orient="records", lines=True)
    return path


def config(folder: Path, *overrides: str) -> Config:
    return compose_config(
        [
            "task=custom", f"task.name={PLUGIN}:Segmentation", "backbone=random", "backbone.architecture=segformer",
            f"+backbone.settings={SEGFORMER}", "data=jsonl", f"data.path={cells(folder)}", "data.client=hospital",
            "adapter.rank=2", "adapter.target_modules=[q_proj,v_proj]",
            "client.lr=3e-2", "rounds=4", "cohort.size=3", "eval.every=4", "engine=loop",
            "engine.threads=1", *overrides,
        ]
    )  # fmt: skip


def test_a_users_task_of_forty_lines_learns_to_outline_cells(tmp_path: Path):
    assert len(PLUGIN.read_text().splitlines()) <= 40
    summary = start(config(tmp_path), tmp_path / "run")
    assert summary["main_metric"] == "dice"
    before = start(config(tmp_path, "rounds=0"), tmp_path / "untrained")["final"]["metrics"]["validation_dice"]
    assert summary["final"]["metrics"]["validation_dice"] > max(0.8, before + 0.2)


def test_a_users_task_is_planned_like_ours(tmp_path: Path):
    assert plan_run(config(tmp_path))["total_bytes"] > 0
