"""What a reader of the documentation has at hand: data, models and runs under the names that commands use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from fedlora.config import Config
from simulations.compose import compose_config
from simulations.simulate import start
from tests.conftest import review_rows
from tests.docs.commands import ROOT
from tests.simulations.test_resume import KillAt, Killed


def settle(place: Path, tiny_bert: Path, tiny_llama: Path) -> None:
    """Put everything into the folder ``place``."""
    _texts(place)
    _pictures(place)
    for name, model in {"tiny-minilm": tiny_bert, "tiny-smollm2": tiny_llama, "models/my-bert": tiny_bert}.items():
        shutil.copytree(model, place / name)
    torch.manual_seed(0)
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 16, 16, 16], "num_attention_heads": [1] * 4, "sr_ratios": [1] * 4}
    segformer = SegformerForSemanticSegmentation(SegformerConfig(decoder_hidden_size=16, **sizes))
    segformer.save_pretrained(place / "models" / "segformer")
    shutil.copy(ROOT / "tests" / "plugins" / "segmentation.py", place)
    networks = (ROOT / "tests" / "plugins" / "networks.py").read_text()
    (place / "nets.py").write_text(f"{networks}\n\nSmall, Large = Narrow, Wide\n")
    start(run_of(place), place / "runs" / "2026-01-31_12-00-00")


def _texts(place: Path) -> None:
    rows = review_rows()
    rows["site"] = rows["site"].replace("site 03", "Some client")
    rows.to_csv(place / "sites.csv", index=False)
    named = rows.rename(columns={"text": "review", "label": "stars", "site": "hospital"})
    named.to_csv(place / "reviews.csv", index=False)
    folder = place / "copies" / "gsm8k" / "main"
    folder.mkdir(parents=True)
    school = [{"question": f"What is {n} plus 1?", "answer": f"{n} + 1 = {n + 1}\n#### {n + 1}"} for n in range(60)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in school))


def _pictures(place: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("benign", "malignant"):
        (place / "scans" / kind).mkdir(parents=True)
        for number in range(60):
            pixels = rng.integers(0, 255, (28, 28), dtype=np.uint8)
            Image.fromarray(pixels).save(place / "scans" / kind / f"{number}.png")
    masks = np.zeros((40, 32, 32), dtype=int)
    masks[:, 8:24, 8:24] = 1
    pictures = rng.integers(0, 60, masks.shape) + 190 * masks
    frame = pd.DataFrame({"image": pictures.tolist(), "mask": masks.tolist()})
    frame.assign(hospital=[f"h{n % 4}" for n in range(40)]).to_parquet(place / "scans.parquet")


def run_of(place: Path) -> Config:
    """A small run on data that are there."""
    overrides = [
        f"data.path={place}/sites.csv", f"backbone.path={place}/tiny-minilm", "data=csv", "data.client=site",
        "backbone=hf", "rounds=2", "cohort.size=2", "client.local_steps=1", "eval.max_rows=16", "engine=loop",
    ]  # fmt: skip
    return compose_config(overrides)


def interrupt(place: Path, run: Path) -> None:
    """Put a run that died after its first round in the place of ``run``."""
    shutil.rmtree(run, ignore_errors=True)
    with pytest.raises(Killed):
        start(run_of(place), run, callbacks=[KillAt(round_end=2)])
