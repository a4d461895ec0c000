"""Fine-tuning as any user of PEFT and transformers writes it: no code of ours but the arrays it reads."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

FEDERATED_RATE, CENTRAL_RATE = 3e-3, 1e-3  # of conf/method/fedit.yaml and central.yaml


@dataclass(frozen=True, eq=False)
class Arrays:
    """The rows of a workload as tokens, and which rows are in which batch.

    Attributes:
        ids: tokens of all rows, one after the other ``[tokens]``.
        offsets: row i is ``ids[offsets[i]:offsets[i + 1]]``.
        labels: class of every row ``[rows]``.
        batches: row numbers ``[rounds, clients, steps, rows]``, from round 1.
        pooled: all rows in order ``[rounds, rows]``, from round 1.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    batches: np.ndarray
    pooled: np.ndarray

    @classmethod
    def read(cls, folder: Path) -> Arrays:
        """Read ``arrays.npz``."""
        with np.load(folder / "arrays.npz") as stored:
            return cls(**{name: stored[name] for name in stored.files})

    def batch(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Inputs of a model, padded to the longest of ``rows``."""
        pieces = [torch.from_numpy(self.ids[self.offsets[row] : self.offsets[row + 1]]).long() for row in rows]
        pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return {
            "input_ids": pad(pieces),
            "attention_mask": pad([torch.ones_like(piece) for piece in pieces]),
            "labels": torch.from_numpy(self.labels[rows]),
        }


@functools.lru_cache(maxsize=1)
def arrays_of(folder: str) -> Arrays:
    """The arrays of this process."""
    return Arrays.read(Path(folder))


def build_model(folder: Path) -> PeftModel:
    """MiniLM (or what the workload has) with LoRA on query and value, r = 8, and a trained head."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    lora = LoraConfig(TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "value"])
    return get_peft_model(model, lora)  # pyright: ignore[reportReturnType]


def train(model: PeftModel, arrays: Arrays, batches: Iterable[np.ndarray], rate: float) -> float:
    """One AdamW step a batch; return the mean loss."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    losses = []
    for rows in batches:
        loss = model(**arrays.batch(rows)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return float(np.mean(losses))
