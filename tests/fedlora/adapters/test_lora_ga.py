"""LoRA-GA: the factors start along the gradient, and the model starts as the backbone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedlora.adapters.base import ADAPTER_NAME
from fedlora.adapters.bases import gradient_factors
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.model import AdaptedModel
from simulations.simulate import start
from tests.conftest import Compose
from tests.fedlora.helpers import (
    SCALES,
    TARGETS,
    bare_backbone,
    first_batch,
    logits,
    of_architecture,
    random_state,
    started,
)
from tests.simulations.test_rounds import rounds_of

FACTORS = ("lora_A", "lora_B")


@pytest.fixture(params=TARGETS)
def federation(tiny: Compose, request: pytest.FixtureRequest) -> Federation:
    folder = request.getfixturevalue(request.param)
    return Federation(
        tiny("method=lora_ga", *of_architecture(request.param, folder), *SCALES["alpha"], "adapter.gamma=16")
    )


def weights(model: AdaptedModel | nn.Module) -> dict[str, Tensor]:
    module = model.module if isinstance(model, AdaptedModel) else model
    named = {name.replace(".base_layer", ""): p for name, p in module.named_parameters() if ".lora_" not in name}
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def test_a_model_starts_as_the_backbone_bit_for_bit(federation: Federation) -> None:
    model, batch, backbone = started(federation), first_batch(federation), bare_backbone(federation)
    assert torch.equal(logits(model.module, batch), logits(backbone, batch))
    assert all(value.any() for key, value in model.read(model.shared).items() if key not in model.head)
    before, after = weights(backbone), weights(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_factors_are_neighbouring_singular_vectors_of_the_gradient(federation: Federation) -> None:
    model = started(federation)
    gradients = federation.public_gradients(federation.build_model())
    for name, gradient in gradients.items():
        u, _, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
        state = model.read(f"{name}.{factor}.weight" for factor in FACTORS)
        for factor, expected in (("lora_A", vh[:4]), ("lora_B", u[:, 4:8].T)):
            rows = state[f"{name}.{factor}.weight"].double()
            rows = (rows if factor == "lora_A" else rows.T) / (gradient.shape[0] ** 0.25 / 4)  # gamma = 16
            torch.testing.assert_close(rows @ rows.T, torch.eye(4).double(), rtol=0, atol=1e-5)
            torch.testing.assert_close(rows.T @ rows, expected.T @ expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_first_step_of_the_product_is_the_best_of_its_rank(rank: int) -> None:
    """Theorem 3.1: B dA + dB A with dA = -B^T G and dB = -G A^T is the best rank-2r approximation of -G."""
    gradient = torch.randn(9, 7, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    b, a = gradient_factors(gradient, rank, gamma=9**0.5)  # singular values 1
    step = b @ b.T @ gradient + gradient @ a.T @ a
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    torch.testing.assert_close(step, (u[:, : 2 * rank] * s[: 2 * rank]) @ vh[: 2 * rank])


def test_delta_is_the_change_of_every_layer_and_what_peft_merges(federation: Federation) -> None:
    model = started(federation)
    state = random_state(model, [key for key in model.shared if key not in model.head])
    model.load(state)
    for name, delta in model.delta(state).items():
        layer = model.layers[name]
        assert isinstance(layer, nn.Module)
        x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(2))  # type: ignore[call-overload]
        with torch.no_grad():
            change = layer(x) - layer.get_base_layer()(x)  # type: ignore[operator]
        torch.testing.assert_close(change, x @ delta.dense().T, rtol=1e-4, atol=1e-5)
        merged = layer.get_delta_weight(ADAPTER_NAME).detach()  # type: ignore[operator]
        oriented = merged.T if isinstance(layer.get_base_layer(), Conv1D) else merged  # type: ignore[operator]
        torch.testing.assert_close(delta.dense(), oriented, rtol=1e-4, atol=1e-5)


def test_the_start_is_sent_once_and_counted(tiny: Compose, tmp_path: Path) -> None:
    start(tiny("method=lora_ga", "cohort.size=null"), tmp_path / "run")
    records = rounds_of(tmp_path / "run")[1:]
    whole = len(records[0]["cohort"]) * 4 * 4 * 4 * (32 + 32)  # fp32, rank 4, query and value of two layers
    assert [record["setup_bytes"] for record in records] == [whole, 0, 0]


def test_a_client_waits_for_the_start_as_plain_lora(tiny: Compose) -> None:
    model = Federation(tiny("method=lora_ga")).build_model()
    assert not any(value.any() for value in model.read(model.frozen).values())
    plain = Federation(tiny("method=fedit")).build_model()
    assert all(torch.equal(value, plain.read([key])[key]) for key, value in model.read(model.shared).items())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.rank=17"], r"adapter\.rank = 17 needs 34 singular vectors.*Use adapter\.rank <= 16"),
        (["strategy=local"], r"strategy=local.*the start of adapter=lora_ga"),
        (["strategy=fedex"], r"strategy=fedex needs adapter=lora, not lora_ga"),
        (["data.split.public_rows=0"], r"adapter=lora_ga starts from gradients.*data\.split\.public_rows"),
    ],
    ids=str,
)
def test_what_lora_ga_cannot_do_is_refused_at_the_start(
    tiny: Compose, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        start(tiny("method=lora_ga", *overrides), tmp_path / "run")
