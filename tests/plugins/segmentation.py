"""A task of your own: outline cells, lesions or organs. Use: task=custom task.name=./segmentation.py:Segmentation."""

import numpy as np
from torch.nn.functional import cross_entropy, interpolate
from transformers import AutoModelForSemanticSegmentation

from fedlora.encoded import EncodedRows
from fedlora.tasks import Schema, Task, collate


class Segmentation(Task):
    name, default_metric = "segmentation", "dice"
    auto_class, head_modules = AutoModelForSemanticSegmentation, ("decode_head",)
    columns = nested = ("image", "label")  # data.image: grey pictures [h, w]; data.label: masks [h, w] of 0 and 1

    def schema(self, rows):
        return Schema(("background", "object"))

    def encode(self, rows, schema, max_length):
        return EncodedRows.from_arrays(**{name: np.array([*map(np.stack, rows[name])]) for name in self.columns})

    def collate(self, rows, numbers):
        batch = collate(rows, numbers, pad_id=0)
        return {"pixels": batch["image"][:, None].expand(-1, 3, -1, -1) / 127.5 - 1, "mask": batch["label"]}

    def logits(self, model, batch):
        return interpolate(model(pixel_values=batch["pixels"]).logits, size=batch["mask"].shape[1:], mode="bilinear")

    def loss(self, model, batch):
        return cross_entropy(self.logits(model, batch), batch["mask"])

    def statistics(self, model, batch):
        logits, truth = self.logits(model, batch), batch["mask"]
        loss, found = cross_entropy(logits, truth, reduction="none"), logits.argmax(1)
        sums = {"loss": loss / truth[0].numel(), "both": found * truth, "either": found + truth}
        return {name: values.sum((1, 2)).cpu().numpy() for name, values in sums.items()}

    def metrics(self, statistics):
        dice = 2 * statistics["both"].sum() / max(statistics["either"].sum(), 1)
        return {"dice": float(dice), "loss": float(statistics["loss"].mean())}
