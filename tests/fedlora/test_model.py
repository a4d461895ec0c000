from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedlora.client import Worker
from fedlora.errors import FedloraError, InputError
from fedlora.federation import Federation
from fedlora.store import ClientStore
from tests.fedlora.helpers import (
    ADAPTERS,
    TARGETS,
    assert_same,
    first_batch,
    logits,
    of_architecture,
    random_state,
    started,
)


@pytest.mark.parametrize("adapter", ["ffa", "fed_sb[seeded]"])
def test_a_frozen_factor_that_gets_switched_on_is_noticed_and_mended(tiny, adapter: str):
    model = Federation(tiny(*ADAPTERS[adapter])).build_model()
    model.assert_trainables()
    layer, factor = model.frozen[0].removesuffix(".weight").rsplit(".", 1)
    getattr(model.layers[layer], factor)["default"].weight.requires_grad_(True)
    with pytest.raises(FedloraError, match=f"{layer}.{factor}"):
        model.assert_trainables()
    model.own_trainables()
    model.assert_trainables()


def test_a_shared_tensor_that_gets_frozen_is_noticed_and_mended(tiny):
    model = Federation(tiny("method=ffa")).build_model()
    model.module.requires_grad_(False)
    with pytest.raises(FedloraError, match="lora_B"):
        model.assert_trainables()
    model.own_trainables()
    model.assert_trainables()


def test_peft_switching_factors_back_on_is_noticed(tiny):
    model = Federation(tiny("method=ffa")).build_model()
    for layer in model.layers.values():
        layer.set_adapter("default")
    with pytest.raises(FedloraError, match="lora_A"):
        model.assert_trainables()


@pytest.mark.parametrize("head", ["shared", "private", "frozen"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_training_round_moves_all_that_is_trained_and_nothing_else(tiny, tmp_path: Path, adapter: str, head: str):
    federation = Federation(tiny(*ADAPTERS[adapter], f"adapter.head={head}", "client.local_steps=3"))
    worker = Worker(federation, ClientStore(tmp_path))
    model = worker.model
    federation.initialise_on_server(model)
    before = {name: value.clone() for name, value in model.module.named_parameters()}
    trained_before = model.read(model.trainable)
    client = federation.clients[0]
    worker.trainer.train([worker.member(trained_before, [client], 1, client)])
    moved = {name for name, value in model.module.named_parameters() if not torch.equal(value, before[name])}
    trained_ids = {id(parameter) for parameter in model.parameters()}
    assert moved == {name for name, value in model.module.named_parameters() if id(value) in trained_ids}
    after = model.read(model.trainable)
    assert all(not torch.equal(after[key], value) for key, value in trained_before.items())


def test_load_and_read_are_inverse(tiny):
    model = Federation(tiny("method=fed_sb", "adapter.head=private")).build_model()
    state = random_state(model, (*model.shared, *model.private, *model.frozen))
    model.load(state)
    assert_same(model.read(state), state)


def test_what_was_read_does_not_change_with_the_model(tiny):
    model = Federation(tiny()).build_model()
    kept = model.read(model.shared)
    model.load(random_state(model, model.shared))
    assert not kept["classifier.bias"].any()


def test_loading_an_unknown_tensor_is_refused(tiny):
    model = Federation(tiny()).build_model()
    with pytest.raises(FedloraError, match=r"'nonsense'.*no such tensor"):
        model.load({"nonsense": torch.zeros(2)})


@pytest.mark.parametrize("shape", [(1,), (2, 1), (2, 2), ()])
def test_loading_another_shape_is_refused(tiny, shape: tuple[int, ...]):
    model = Federation(tiny()).build_model()
    before = model.read(["classifier.bias"])
    with pytest.raises(FedloraError, match=r"'classifier.bias'.*expected \[2\]"):
        model.load({"classifier.bias": torch.ones(shape)})
    assert_same(model.read(["classifier.bias"]), before)


@pytest.mark.parametrize("architecture", TARGETS)
def test_a_base_correction_is_the_same_as_a_changed_weight(tiny, request, architecture: str):
    federation = Federation(tiny(*of_architecture(architecture, request.getfixturevalue(architecture))))
    model, batch = federation.build_model(), first_batch(federation)
    model.load(random_state(model, model.shared))
    plain = logits(model.module, batch)
    generator = torch.Generator().manual_seed(1)
    corrections = {
        name: 0.05 * torch.randn(layer.out_features, layer.in_features, generator=generator)
        for name, layer in list(model.layers.items())[:-1]
    }
    model.set_base_correction(corrections)
    corrected = logits(model.module, batch)
    model.set_base_correction({})
    assert torch.equal(logits(model.module, batch), plain)
    with torch.no_grad():
        for name, correction in corrections.items():
            weight = model.layers[name].get_base_layer().weight
            weight.add_(correction.T if architecture == "tiny_gpt2" else correction)
    torch.testing.assert_close(corrected, logits(model.module, batch), rtol=1e-4, atol=1e-5)
    assert (corrected - plain).abs().max() > 1e-3


def test_a_base_correction_carries_gradients_to_the_layers_before_it(tiny):
    federation = Federation(tiny())
    model, batch = federation.build_model(), first_batch(federation)
    model.load(random_state(model, model.shared))
    key = model.shared[0]

    def gradient() -> torch.Tensor:
        model.module.zero_grad()
        federation.task.loss(model.module, batch).backward()
        return model.parameters()[model.trainable.index(key)].grad.clone()

    name = list(model.layers)[-1]
    correction = 0.2 * torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    model.set_base_correction({name: correction})
    beside = gradient()
    model.set_base_correction({})
    with torch.no_grad():
        model.layers[name].get_base_layer().weight.add_(correction)
    torch.testing.assert_close(beside, gradient(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("adapter", ["lora", "fed_sb[seeded]"])
def test_a_rank_larger_than_a_layer_is_refused(tiny, tiny_llama, adapter: str):
    overrides = [*ADAPTERS[adapter], *of_architecture("tiny_llama", tiny_llama)]  # k_proj is 16 x 32
    Federation(tiny(*overrides, "adapter.rank=16")).build_model()
    with pytest.raises(InputError, match=r"adapter\.rank = 17 .*k_proj.*\(16 x 32\).*adapter\.rank <= 16"):
        Federation(tiny(*overrides, "adapter.rank=17")).build_model()


def test_target_modules_that_match_nothing_are_refused_with_the_names_that_would(tiny):
    with pytest.raises(InputError, match=r"adapter\.target_modules.*querry.*matches no layer.*query"):
        Federation(tiny("adapter.target_modules=[querry]")).build_model()


@pytest.mark.parametrize("adapter", ["lora", "ffa", "fed_sb[seeded]"])
def test_target_modules_that_are_not_linear_are_refused(tiny, adapter: str):
    with pytest.raises(InputError, match=r"adapter\.target_modules.*word_embeddings.*linear"):
        Federation(tiny(*ADAPTERS[adapter], "adapter.target_modules=[word_embeddings]")).build_model()


@pytest.mark.parametrize("architecture", TARGETS)
@pytest.mark.parametrize("adapter", ["lora", "fed_sb[gradient]", "fed_sb[weight]"])
def test_the_meta_model_has_the_shapes_of_the_real_one(tiny, request, architecture: str, adapter: str):
    folder = request.getfixturevalue(architecture)
    federation = Federation(tiny(*ADAPTERS[adapter], *of_architecture(architecture, folder), "adapter.head=private"))
    real, meta = federation.build_model(), federation.build_meta_model()
    for keys in ("shared", "private", "frozen", "head"):
        assert getattr(meta, keys) == getattr(real, keys)
    everything = (*real.trainable, *real.frozen)
    assert meta.shapes(everything) == real.shapes(everything)
    assert all(parameter.is_meta for parameter in meta.module.parameters())
    assert list(meta.delta(meta.read(meta.shared))) == list(real.layers)


def test_dropout_is_off_so_that_training_is_reproducible(tiny):
    federation = Federation(tiny())
    model, batch = federation.build_model(), first_batch(federation)
    model.module.train()
    assert torch.equal(logits(model.module, batch), logits(model.module, batch))


def test_the_backbone_weights_are_not_touched_by_injection(tiny):
    federation = Federation(tiny("method=fed_sb"))
    first = started(federation)
    second = federation.build_model()
    for layer, other in zip(first.layers.values(), second.layers.values(), strict=True):
        assert torch.equal(layer.get_base_layer().weight, other.get_base_layer().weight)


@pytest.mark.parametrize("adapter", ["lora", "ffa", "fed_sb[seeded]"])
def test_dropout_of_the_adapter_acts_in_training_only(tiny, adapter: str):
    federation = Federation(tiny(*ADAPTERS[adapter], "adapter.dropout=0.5"))
    model, batch = federation.build_model(), first_batch(federation)
    model.load(random_state(model, model.shared))
    assert torch.equal(logits(model.module, batch), logits(model.module, batch))
    model.module.train()
    assert not torch.equal(logits(model.module, batch), logits(model.module, batch))
