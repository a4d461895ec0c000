"""The five convolutional networks that are the usual clients of model-heterogeneous federated learning.

conv 5x5 -> pool -> conv 5x5 -> pool -> FC1 -> FC2 -> FC3, ReLU between; they differ in the filters of the second
convolution and in the width of FC1 (the experiments of Yi et al. 2023, arXiv 2310.13283). FC2 gives the features, 500
numbers a picture in all five; FC3 is the classifier.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedlora.errors import InputError
from fedlora.personal.inputs import Picture

WIDTH = 500
SMALLEST = 16
"""Of a smaller picture (in pixels a side) two convolutions without padding and two pools leave nothing."""


class Sizes(NamedTuple):
    """What the networks differ in: filters of the second convolution, and outputs of FC1."""

    filters: int
    hidden: int


CNNS = {
    "cnn_1": Sizes(32, 2000),
    "cnn_2": Sizes(16, 2000),
    "cnn_3": Sizes(32, 1000),
    "cnn_4": Sizes(32, 800),
    "cnn_5": Sizes(32, 500),
}


class CNN(nn.Module):
    """One of the five networks, for pictures of any size from 16 x 16 on."""

    def __init__(self, sizes: Sizes, picture: Picture, classes: int) -> None:
        """Build for ``picture``.

        Raises:
            InputError: the picture is too small.
        """
        super().__init__()
        channels, *sides = picture
        if min(sides) < SMALLEST:
            raise InputError(
                f"Pictures of {sides[0]} x {sides[1]} pixels are too small for two convolutions of 5 x 5: set "
                f"task.image_size={SMALLEST} or more, which scales them, or give backbone.models a network of your own."
            )
        after = [((side - 4) // 2 - 4) // 2 for side in sides]
        self.conv1 = nn.Conv2d(channels, 16, 5)
        self.conv2 = nn.Conv2d(16, sizes.filters, 5)
        self.fc1 = nn.Linear(sizes.filters * after[0] * after[1], sizes.hidden)
        self.fc2 = nn.Linear(sizes.hidden, WIDTH)
        self.classifier = nn.Linear(WIDTH, classes)

    def features(self, pictures: Tensor) -> Tensor:
        """``[b, 500]`` from pictures ``[b, channels, h, w]``."""
        hidden = functional.max_pool2d(functional.relu(self.conv1(pictures)), 2)
        hidden = functional.max_pool2d(functional.relu(self.conv2(hidden)), 2)
        hidden = functional.relu(self.fc1(torch.flatten(hidden, 1)))
        return functional.relu(self.fc2(hidden))
