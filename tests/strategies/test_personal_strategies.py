"""The server side of methods whose clients have models of their own, on numbers written out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from fedlora.adapters import State
from fedlora.errors import InputError
from fedlora.federation import Federation
from strategies import FedProto, PFedLoRA, Reply
from strategies.build import build_strategy
from tests.conftest import Compose


def replies(states: Sequence[State], examples: Sequence[int]) -> list[Reply]:
    total = sum(examples)
    return [Reply(f"c{i}", s, n, n / total, 0.5) for i, (s, n) in enumerate(zip(states, examples, strict=True))]


def test_the_adapter_becomes_the_mean_weighted_by_rows() -> None:
    states = [{"adapter.up.weight": torch.full((2, 3), float(value))} for value in (1, 2, 6)]
    folded = PFedLoRA().fold(1, states[0], replies(states, [10, 30, 60]))
    assert torch.equal(folded["adapter.up.weight"], torch.full((2, 3), 0.1 * 1 + 0.3 * 2 + 0.6 * 6))
    uniform = PFedLoRA(weighting="uniform")
    assert uniform.weighting == "uniform"
    assert PFedLoRA.exact is False


def test_a_prototype_is_the_mean_over_all_rows_of_its_class() -> None:
    old = {"adapter.means": torch.tensor([[9.0], [9.0], [9.0]]), "adapter.counts": torch.tensor([1.0, 1.0, 1.0])}
    one = {"adapter.means": torch.tensor([[1.0], [4.0], [0.0]]), "adapter.counts": torch.tensor([3.0, 2.0, 0.0])}
    two = {"adapter.means": torch.tensor([[5.0], [0.0], [0.0]]), "adapter.counts": torch.tensor([1.0, 0.0, 0.0])}
    folded = FedProto().fold(1, old, replies([one, two], [5, 1]))
    assert folded["adapter.means"].flatten().tolist() == [2.0, 4.0, 9.0]
    assert folded["adapter.counts"].tolist() == [4.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("method", "overrides", "message"),
    [
        ("pfedlora", ["strategy=fedproto"], r"strategy=fedproto needs adapter=prototypes"),
        ("fedproto", ["strategy=pfedlora"], r"strategy=pfedlora needs adapter=pfedlora"),
        ("pfedlora", ["strategy=average"], r"adapter=pfedlora keeps .* no one model that Average"),
        ("local_full", ["strategy=average"], r"adapter=full has nothing in common for clients with other models"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    digits: Compose, method: str, overrides: list[str], message: str
) -> None:
    config = digits(method, *overrides)
    with pytest.raises(InputError, match=message):
        build_strategy(config.strategy, Federation(config).build_meta_model())


def test_one_model_that_all_clients_have_travels_whole_and_its_mean_is_exact(digits: Compose) -> None:
    federation = Federation(digits("fedavg", "backbone.models=[cnn_5]", "task.image_size=16"))
    model = federation.build_model()
    build_strategy(federation.config.strategy, model)
    assert model.private == ()
    assert set(model.shared) == {f"models.cnn_5.{name}" for name, _ in model.module.models["cnn_5"].named_parameters()}  # pyright: ignore
    assert model.affinity.affine
    for key, delta in model.delta(model.read(model.shared)).items():
        value = model.read([key])[key]
        torch.testing.assert_close(delta.dense(), value.reshape(len(value), -1))
