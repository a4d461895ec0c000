"""``python -m simulations.published.private.public_model FOLDER``: a small vision transformer of public digits.

It is trained on the 1,797 digits of 8x8 pixels that come with scikit-learn, enlarged and shifted at random. The folder
holds the transformer without its head, for ``backbone=hf backbone.path=FOLDER``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

EPOCHS, BATCH, RATE, SHIFT = 100, 64, 1e-3, 3


def architecture() -> ViTConfig:
    """Four layers of width 64 over 4 x 4 patches of 7 x 7 pixels: 138,000 numbers without the head."""
    settings = ViTConfig(
        image_size=28, patch_size=7, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128,
    )  # fmt: skip
    settings.num_labels = 10
    return settings


def enlarged(pictures: Tensor) -> Tensor:
    """``[rows, 8, 8]`` from 0 to 16 as ``[rows, 1, 28, 28]`` from -1 to 1: 20 pixels on black, as in MNIST."""
    larger = nn.functional.interpolate(pictures[:, None], 20, mode="bilinear")
    return nn.functional.pad(larger / 16, (4, 4, 4, 4)) * 2 - 1


def shifted(pictures: Tensor, draw: torch.Generator) -> Tensor:
    """The batch moved by up to ``SHIFT`` pixels each way."""
    down, right = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=draw).tolist()
    return pictures.roll((down, right), (2, 3))


def main(folder: Path) -> None:
    """Train and write the model."""
    torch.manual_seed(1)
    draw = torch.Generator().manual_seed(1)
    values, labels = load_digits(return_X_y=True)
    pictures = enlarged(torch.as_tensor(values, dtype=torch.float32).reshape(-1, 8, 8))
    targets = torch.as_tensor(labels)
    model = ViTForImageClassification(architecture())
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for epoch in range(EPOCHS):
        right = 0
        for rows in torch.randperm(len(targets), generator=draw).split(BATCH):
            logits = model(shifted(pictures[rows], draw)).logits
            loss = nn.functional.cross_entropy(logits, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right += int((logits.argmax(1) == targets[rows]).sum())
        print(f"epoch {epoch + 1}: {right / len(targets):.3f} of the public digits")
    model.vit.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
