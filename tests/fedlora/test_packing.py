"""No work on padding, and the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification

from fedlora.client import Worker
from fedlora.evaluation import row_statistics
from fedlora.federation import Federation
from fedlora.packed_attention import PackedLayout, PickRows, SpreadRows, bucket_length
from fedlora.packing import Packer
from fedlora.store import ClientStore
from tests.conftest import Compose

ENCODERS = {
    "bert": {},
    "roberta": {"pad_token_id": 0, "max_position_embeddings": 64},
    "electra": {"embedding_size": 32},
    "distilbert": {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2},
    "modernbert": {"global_attn_every_n_layers": 1, "pad_token_id": 0, "local_attention": 128},
}
DECODERS = {
    "llama": {"num_key_value_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "qwen2": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 64, "attn_logit_softcapping": None},
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def model_of(name: str, settings: dict[str, object]) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=50, **{**SIZES, "pad_token_id": 0}, **_known(name, settings))
    for key, value in config.to_dict().items():
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
            setattr(config, key, 0.0)
    config.use_cache = False
    return AutoModelForSequenceClassification.from_config(config).eval()


def _known(name: str, settings: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in settings.items() if key not in ("pad_token_id",)}


def batch_of(lengths: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    width = max(lengths)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(1, 50, (len(lengths), width), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("spare", [False, True])
@pytest.mark.parametrize("name", [*ENCODERS, *DECODERS])
def test_a_packed_model_gives_the_numbers_of_the_padded_one(
    name: str, spare: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spare:  # as on a CPU in bf16
        monkeypatch.setattr("fedlora.packing.PackedLayout", lambda mask, rounded: PackedLayout(mask, rounded=True))
    model = model_of(name, {**ENCODERS, **DECODERS}[name])
    packer = Packer(model)
    batch = batch_of([3, 17, 9, 1, 24, 9])
    assert packer.blocks is not None
    found = {}
    tokens: list[int] = []
    packer.blocks[0].register_forward_hook(lambda block, args, output: tokens.append(_hidden(output).shape[1]))
    for enabled in (False, True):
        model.zero_grad()
        with packer.using(enabled):
            logits = model(**batch).logits
        logits.square().sum().backward()
        gradients = [p.grad.clone() for p in packer.blocks.parameters() if p.grad is not None]
        found[enabled] = [logits.detach(), *gradients]
    assert packer.layout is None
    assert tokens == [24, 64 if spare else 63]
    assert len(found[True]) == len(found[False]) > 10
    for packed, padded in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-6)


def _hidden(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]


def test_only_real_tokens_go_through_the_blocks() -> None:
    model = model_of("bert", {})
    packer = Packer(model)
    assert packer.blocks is not None
    seen: list[tuple[int, ...]] = []
    packer.blocks[0].attention.self.query.register_forward_hook(  # type: ignore[union-attr]
        lambda layer, args, output: seen.append(tuple(args[0].shape))
    )
    with packer.using(True):
        model(**batch_of([3, 17, 9]))
        model(**batch_of([5, 5]))  # nothing to skip
    assert seen == [(1, 29, 32), (2, 5, 32)]


@pytest.mark.parametrize("lengths", [[3, 17, 9], [6, 6]])
def test_a_cut_last_block_computes_the_first_tokens_only(lengths: list[int]) -> None:
    model = model_of("bert", {})
    packer = Packer(model)
    assert packer.blocks is not None
    seen: list[tuple[int, ...]] = []
    packer.blocks[-1].intermediate.register_forward_hook(  # type: ignore[union-attr]
        lambda layer, args, output: seen.append(tuple(args[0].shape))
    )
    batch = batch_of(lengths)
    with packer.using(False):
        expected = model(**batch).logits
    with packer.using(True, first_only=True):
        found = model(**batch).logits
    assert np.prod(seen[1][:2]) == len(lengths)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_padding_on_the_left_and_generation_are_left_alone() -> None:
    model = model_of("llama", DECODERS["llama"])
    packer = Packer(model)
    batch = batch_of([4, 9])
    flipped = {key: value.flip(1) for key, value in batch.items()}
    with packer.using(False):
        expected = model(**flipped).logits, model(**batch, use_cache=True).logits
    with packer.using(True):
        assert torch.equal(model(**flipped).logits, expected[0])
        assert torch.equal(model(**batch, use_cache=True).logits, expected[1])


@pytest.mark.parametrize(
    ("overrides", "packed", "cut"),
    [
        ([], True, True),
        (["adapter.head=private"], True, True),
        (["backbone.gradient_checkpointing=true"], False, False),
        (["engine.packing=false"], False, False),
    ],
    ids=str,
)
def test_what_is_packed_is_measured(
    tiny: Compose, tmp_path: Path, overrides: list[str], packed: bool, cut: bool
) -> None:
    worker = Worker(Federation(tiny(*overrides)), ClientStore(tmp_path))
    assert not worker.model.packer.enabled
    assert worker.trainer.reason
    assert (worker.model.packer.enabled, worker.model.packer.first_only) == (packed, cut)


def test_a_language_model_is_packed_and_not_cut(tiny_lm: Compose, tmp_path: Path) -> None:
    worker = Worker(Federation(tiny_lm()), ClientStore(tmp_path))
    assert worker.trainer.reason
    assert (worker.model.packer.enabled, worker.model.packer.first_only) == (True, False)


def test_an_adapter_that_looks_at_padding_is_not_packed(tiny: Compose, tmp_path: Path) -> None:
    lily = ["adapter=peft", "adapter.config._target_=peft.LilyConfig", "adapter.config.r=4"]
    targets = "adapter.target_modules=[query,intermediate.dense]"
    worker = Worker(Federation(tiny(*lily, targets)), ClientStore(tmp_path))
    assert worker.trainer.reason
    assert not worker.model.packer.enabled


@pytest.mark.parametrize("kind", ["tiny", "tiny_lm"])
def test_evaluation_gives_the_same_statistics(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    worker = Worker(Federation(request.getfixturevalue(kind)()), ClientStore(tmp_path))
    federation = worker.federation
    rows = np.arange(40)
    found = []
    for enabled in (False, True):
        assert worker.trainer.reason
        with worker.model.packer.using(enabled, enabled and worker.model.packer.first_only):
            found.append(row_statistics(worker.model, federation.task, federation.rows, rows, 8))
    for name, values in found[0].items():
        np.testing.assert_allclose(found[1][name], values, rtol=1e-4, atol=1e-5, err_msg=name)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=12))
def test_every_token_has_its_own_slot_beside_tokens_of_its_sequence(lengths: list[int]) -> None:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    layout = PackedLayout(mask.long())
    assert layout.tokens == sum(lengths)
    assert torch.equal(layout.slots[layout.places], torch.arange(layout.tokens))
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen, offset = 0, 0
    for bucket in layout.buckets:
        slots = layout.slots[offset : offset + bucket.count * bucket.length].view(bucket.count, bucket.length)
        offset += bucket.count * bucket.length
        real = torch.ones_like(slots, dtype=torch.bool) if bucket.mask is None else bucket.mask[:, 0, 0]
        for row, there in zip(slots, real, strict=True):
            assert len(set(owner[row[there]].tolist())) == 1
            seen += int(there.sum())
            assert torch.equal(row[there], torch.arange(int(row[0]), int(row[0]) + int(there.sum())))
    assert seen == layout.tokens


@given(st.integers(1, 5000))
def test_a_bucket_wastes_little_and_depends_on_the_length_alone(length: int) -> None:
    padded = int(bucket_length(torch.tensor([length]))[0])
    assert length <= padded < length + max(8, length / 4 + 1)


def test_picking_and_spreading_rows_have_the_gradients_of_indexing() -> None:
    x = torch.randn(6, 3, dtype=torch.double, requires_grad=True)
    places = torch.tensor([4, 0, 5])
    assert torch.autograd.gradcheck(lambda x: PickRows.apply(x, places), (x,))
    assert torch.autograd.gradcheck(lambda x: PickRows.apply(x, places, 2), (x,))
    assert torch.autograd.gradcheck(lambda x: SpreadRows.apply(x[:3], places, 6), (x,))
