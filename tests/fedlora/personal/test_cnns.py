"""The five networks of the usual experiments, to the parameter."""

from __future__ import annotations

import pytest
import torch

from fedlora.errors import InputError
from fedlora.personal.cnns import CNN, CNNS, Picture

PARAMETERS = {
    10: (2_621_558, 1_815_142, 1_320_558, 1_060_358, 670_058),
    100: (2_666_648, 1_860_232, 1_365_648, 1_105_448, 715_148),
}


@pytest.mark.parametrize("classes", PARAMETERS)
def test_networks_have_the_published_parameters_on_cifar(classes: int) -> None:
    with torch.device("meta"):
        networks = [CNN(sizes, (3, 32, 32), classes) for sizes in CNNS.values()]
    assert tuple(sum(p.numel() for p in network.parameters()) for network in networks) == PARAMETERS[classes]


@pytest.mark.parametrize("picture", [(1, 28, 28), (3, 32, 32), (1, 16, 16), (3, 21, 40)])
def test_networks_read_pictures_of_any_size_and_give_features_of_one_width(picture: Picture) -> None:
    for sizes in CNNS.values():
        with torch.device("meta"):
            network = CNN(sizes, picture, 7)
            features = network.features(torch.zeros(2, *picture))
        assert features.shape == (2, 500)
        assert network.classifier(features).shape == (2, 7)


@pytest.mark.parametrize("picture", [(1, 8, 8), (3, 32, 15)])
def test_pictures_that_leave_nothing_are_refused(picture: Picture) -> None:
    with pytest.raises(InputError, match=r"task\.image_size=16"):
        CNN(CNNS["cnn_1"], picture, 10)
