"""Tasks of a user that go wrong in a worker, and what tests of Ray share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedlora.encoded import EncodedRows
from fedlora.tasks import Batch
from fedlora.tasks.classification import Classification


class Deadly(Classification):
    """Kills a worker that meets the row FEDLORA_TEST_ROW, unless the file FEDLORA_TEST_MARKER is there.

    The file is made by the one that dies, so that the next one lives, unless its folder is missing.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.driver = os.getpid()
        self.row = int(os.environ["FEDLORA_TEST_ROW"])
        self.marker = Path(os.environ["FEDLORA_TEST_MARKER"])

    def collate(self, encoded: EncodedRows, rows: np.ndarray) -> Batch:
        if os.getpid() != self.driver and self.row in rows and not self.marker.exists():
            if self.marker.parent.exists():
                self.marker.touch()
            os._exit(1)
        return super().collate(encoded, rows)


class SmallMemory(Classification):
    """Runs out of memory in a training step of more than eight rows, as a GPU would."""

    def row_losses(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        if torch.is_grad_enabled() and len(batch["target"]) > 8:
            raise torch.OutOfMemoryError("more than eight rows")
        return super().row_losses(model, batch)
