"""Lay out a workload in a folder that every variant reads: rows, model, start and order of the rows.

``rows.parquet`` is the data set (``text``, ``label``, ``client``); ``model/`` the backbone with its head and tokenizer;
``arrays.npz`` the same rows as tokens, and which rows are in which batch of which round; ``start.safetensors`` the
adapter and head that round 1 starts from, under PEFT's names. Our own variants read the first two through an ordinary
configuration; the others read everything but the table, so that all see the same rows in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig
from transformers.utils import logging

from fedlora.client import Worker
from fedlora.config import DataConfig
from fedlora.data.packaged import rotten_tomatoes
from fedlora.federation import Federation
from fedlora.packaged import minilm_folder
from fedlora.seeding import numpy_rng
from fedlora.store import ClientStore
from fedlora.training import batch_order
from simulations.benchmark.workloads import Workload, size_of
from simulations.compose import compose_config
from strategies.central import POOL

DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Prepared:
    """A workload on disk.

    Attributes:
        workload: what it is.
        folder: where it lies.
        rounds: rounds for which batches are laid out, the warm-up included.
        tokens: tokens of a round's rows, without padding.
        weights: weights in matrix products of the frozen backbone: those of every linear layer of the encoder.
    """

    workload: Workload
    folder: Path
    rounds: int
    tokens: int
    weights: int

    @property
    def flops(self) -> float:
        """Nominal work of a round: forward and backward through the frozen weights, 4 P a token."""
        return 4.0 * self.weights * self.tokens


def prepare(workload: Workload, folder: Path, rounds: int) -> Prepared:
    """Write the files of ``workload`` for ``rounds`` rounds into ``folder``."""
    folder.mkdir(parents=True)
    table(workload).to_parquet(folder / "rows.parquet")
    weights = _save_model(workload, folder / "model")
    federation = Federation(compose_config(settings(workload, folder, rounds)))
    worker = Worker(federation, ClientStore(folder / "unused"))
    start = worker.model.read(worker.model.shared)
    save_file({f"base_model.model.{key}": value for key, value in start.items()}, folder / "start.safetensors")
    rows = federation.rows
    each, pooled = _order(federation, rounds)
    np.savez(
        folder / "arrays.npz",
        ids=rows.ragged["input_ids"],
        offsets=rows.offsets,
        labels=rows.fixed["target"],
        batches=each,
        pooled=pooled,
    )
    return Prepared(workload, folder, rounds, int(rows.lengths(np.arange(len(rows))).sum()), weights)


def settings(workload: Workload, folder: Path, rounds: int) -> list[str]:
    """The overrides that make a run of ours train exactly this workload, without evaluation and checkpoints."""
    return [
        "method=fedit", "task=classification", "backbone=hf", f"backbone.path={folder / 'model'}",
        "data=parquet", f"data.path={folder / 'rows.parquet'}", "data.client=client", "partition=natural",
        "partition.min_rows=1", "data.split.validation=0", "data.split.test=0", "data.split.unseen_clients=0",
        f"rounds={rounds + 1}", f"eval.every={rounds + 2}", "checkpoint.every=0", "cohort.size=null",
        f"client.batch_size={workload.rows}", f"client.local_steps={workload.steps}",
        f"client.max_length={workload.length}",
    ]  # fmt: skip


def table(workload: Workload) -> pd.DataFrame:
    """Reviews dealt out so that every client has exactly the rows of its steps.

    Columns ``text``, ``label`` and ``client``, one row a row of the round; reviews repeat when there are too few.
    """
    reviews = rotten_tomatoes(DataConfig(name="rotten_tomatoes"))
    order = np.resize(numpy_rng(1, "benchmark").permutation(len(reviews)), workload.total_rows)
    rows = reviews.iloc[order][["text", "label"]].reset_index(drop=True)
    if not workload.real:
        rows["text"] = [repeated(text, workload.length) for text in rows["text"]]
    owners = np.repeat(np.arange(workload.clients), workload.steps * workload.rows)
    rows["client"] = [f"client {owner:06d}" for owner in owners]
    return rows


def repeated(text: str, words: int) -> str:
    """``text`` again and again up to ``words`` words.

    A word is at least one token, so that what a tokenizer makes of it is never shorter than ``words`` tokens and is cut
    to exactly that many.
    """
    return " ".join(np.resize(np.array(text.split(), dtype=object), words))


def _save_model(workload: Workload, folder: Path) -> int:
    """Save backbone, head and tokenizer; return the number of weights in the encoder's matrix products."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(1)
    if workload.backbone == "minilm":
        model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2, **DROPOUT)
    else:
        layers, hidden = size_of(workload.backbone)
        shape = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 4 * hidden}
        heads = max(1, hidden // 32)
        config = BertConfig(**shape, num_attention_heads=heads, num_labels=2, **DROPOUT)  # pyright: ignore
        model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder)
    return sum(module.weight.numel() for module in model.bert.encoder.modules() if isinstance(module, nn.Linear))


def _order(federation: Federation, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of each batch ``[rounds, clients, steps, rows]`` and of the shuffled pool ``[rounds, all rows]``."""
    config, train = federation.config, federation.index.train
    size, steps = config.client.batch_size, config.client.local_steps
    everything = np.concatenate(list(train.values()))

    def batches(server_round: int, stream: str, rows: np.ndarray) -> np.ndarray:
        rng = numpy_rng(config.seed, "batches", server_round, stream)
        return np.stack(list(batch_order(rows, size, 1, steps, rng)))

    def shuffled(server_round: int) -> np.ndarray:
        rng = numpy_rng(config.seed, "batches", server_round, POOL)
        return next(batch_order(everything, len(everything), 1, 1, rng))

    numbers: Sequence[int] = range(1, rounds + 1)
    each = [[batches(number, client, rows) for client, rows in train.items()] for number in numbers]
    return np.array(each), np.array([shuffled(number) for number in numbers])
