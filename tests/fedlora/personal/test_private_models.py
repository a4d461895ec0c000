"""Models of the user's own, and what is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.adapters.personal import SharedPart
from fedlora.config import BackboneConfig
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.personal.inputs import Pictures
from fedlora.personal.private_models import build_private_models
from tests.conftest import Compose


def named(*models: str) -> BackboneConfig:
    return BackboneConfig(name="heterogeneous", models=list(models))


def test_each_architecture_starts_from_the_seed_whatever_stands_beside_it(networks: Path) -> None:
    narrow, wide = f"{networks}:Narrow", f"{networks}:Wide"
    both = build_private_models(named(wide, narrow), Pictures((1, 8, 8)), 10, 5, "cpu")
    alone = build_private_models(named(narrow), Pictures((1, 8, 8)), 10, 5, "cpu")
    other = build_private_models(named(narrow), Pictures((1, 8, 8)), 10, 6, "cpu")
    weights = [models.models["Narrow"].get_parameter("classifier.weight") for models in (both, alone, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_without_anything_shared_a_model_answers_with_its_own_classifier(networks: Path) -> None:
    models = build_private_models(named(f"{networks}:Narrow"), Pictures((1, 8, 8)), 10, 5, "cpu")
    outputs = models(torch.rand(3, 1, 8, 8))
    assert outputs.features.shape == (3, 24)
    assert torch.equal(outputs.logits, outputs.own)
    assert not list(SharedPart().parameters())


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ("[]", r"backbone\.models is empty"),
        ("[cnn_6]", r"backbone\.models names 'cnn_6', which is not known\. Did you mean 'cnn_\d'\?"),
        ("[cnn_1,cnn_1]", r"two models called 'cnn_1'"),
        ("[NETS:Narrow,NETS:Thin]", r"'NETS:Thin' have 10 numbers and Narrow have 24.*a last layer of 24 outputs"),
        ("[NETS:Narrow,cnn_1]", r"pictures of 8 x 8 pixels are too small.*task\.image_size=16"),
        ("[NETS:Normalised]", r"'NETS:Normalised' has running statistics \('norm\.running_mean'\).*GroupNorm"),
        ("[NETS:Deaf]", r"must give a torch\.nn\.Module with features\(pictures\).*it gives a Deaf"),
        ("[NETS:Greedy]", r"logits \[2, 11\] for two pictures; needed are \[2, width\] and \[2, 10\]"),
        ("[NETS:Confused]", r"'NETS:Confused' does not read pictures of shape \[1, 8, 8\]"),
        ("[NETS:broken]", r"called with \(picture=\(1, 8, 8\), classes=10\) fails"),
        ("[NETS:Missing]", r"there is no 'Missing' in it"),
    ],
)
def test_models_that_cannot_work_are_refused_at_the_start(
    digits: Compose, networks: Path, models: str, message: str
) -> None:
    config = digits("pfedlora", f"backbone.models={models.replace('NETS', str(networks))}")
    with pytest.raises(InputError, match=f"(?i){message.replace('NETS', str(networks))}"):
        Federation(config).build_model()


def test_features_of_another_width_than_asked_for_are_refused(digits: Compose, networks: Path) -> None:
    with pytest.raises(InputError, match=r"have 24 numbers and backbone\.width = 30"):
        Federation(digits("pfedlora", "backbone.width=30")).build_model()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter=lora", "strategy=fedit"], r"adapter=lora changes the layers of a backbone that all clients have"),
        (["precision=bf16"], r"Set precision=fp32"),
        (["adapter.rank=25"], r"adapter\.rank = 25 is larger than the 24 features"),
    ],
)
def test_settings_that_need_a_common_backbone_are_refused(digits: Compose, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Federation(digits("pfedlora", *overrides)).build_model()


def test_a_shared_part_needs_private_models(tiny: Compose) -> None:
    with pytest.raises(InputError, match=r"adapter=pfedlora stands beside models.*Use backbone=heterogeneous"):
        Federation(tiny("adapter=pfedlora", "strategy=pfedlora")).build_model()


def test_networks_of_pictures_refuse_texts(tiny: Compose, tiny_bert: Path) -> None:
    backbone = named("cnn_5").model_copy(update={"tokenizer": str(tiny_bert)})
    with pytest.raises(InputError, match=r"'cnn_5' reads pictures.*choose task=image_classification"):
        Federation(tiny().model_copy(update={"backbone": backbone})).build_model()
