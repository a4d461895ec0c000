"""What is laid out for the variants: exact rows, exact lengths, every row once a round."""

from __future__ import annotations

import numpy as np
import pytest

from simulations.benchmark.plain import Arrays, build_model, train
from simulations.benchmark.prepare import Prepared, prepare, repeated, table
from simulations.benchmark.workloads import Workload

TINY = Workload("tiny", clients=3, steps=2, rows=4, length=24, backbone="2x32")
TINY_REAL = Workload("tiny-real", clients=3, steps=2, rows=4, length=24, real=True, backbone="2x32")


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(TINY, tmp_path_factory.mktemp("fixed") / "w", rounds=2)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(TINY_REAL, tmp_path_factory.mktemp("real") / "w", rounds=2)


def lengths(prepared: Prepared) -> np.ndarray:
    return np.diff(Arrays.read(prepared.folder).offsets)


def test_a_text_is_repeated_word_by_word_up_to_a_length() -> None:
    assert repeated("a b c", 7) == "a b c a b c a"
    assert repeated("a b c", 2) == "a b"


def test_rows_of_fixed_length_have_exactly_that_many_tokens_and_no_padding(fixed: Prepared) -> None:
    assert set(lengths(fixed)) == {TINY.length}
    assert fixed.tokens == TINY.total_rows * TINY.length
    batch = Arrays.read(fixed.folder).batch(np.arange(5))
    assert batch["attention_mask"].shape == (5, TINY.length)
    assert bool(batch["attention_mask"].all())


def test_rows_of_real_length_keep_theirs_and_only_their_tokens_count(real: Prepared) -> None:
    assert len(set(lengths(real))) > 3
    assert real.tokens == lengths(real).sum() < TINY.total_rows * TINY.length
    batch = Arrays.read(real.folder).batch(np.arange(TINY.total_rows))
    assert int(batch["attention_mask"].sum()) == real.tokens


def test_every_client_owns_the_rows_of_its_steps_even_when_there_are_more_than_reviews() -> None:
    assert set(table(TINY).groupby("client").size()) == {8}
    assert len(table(Workload("many", clients=5000, steps=1, rows=4, length=4))) == 20000


def test_every_row_is_in_one_batch_a_round_of_its_own_client_and_in_the_pool(fixed: Prepared) -> None:
    arrays = Arrays.read(fixed.folder)
    assert arrays.batches.shape == (2, 3, 2, 4)
    for number in range(2):
        owned = arrays.batches[number].reshape(3, 8)
        assert [sorted(rows) for rows in owned] == np.arange(24).reshape(3, 8).tolist()
        assert sorted(arrays.pooled[number]) == list(range(24))
    assert not np.array_equal(arrays.batches[0], arrays.batches[1])


def test_work_counts_the_encoders_matrix_products_alone(fixed: Prepared) -> None:
    hidden, layers = 32, 2
    assert fixed.weights == layers * 12 * hidden**2
    assert fixed.flops == 4 * fixed.weights * fixed.tokens


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # asked by PEFT, of transformers
def test_the_plain_model_trains_lora_and_the_head_and_learns(fixed: Prepared) -> None:
    model, arrays = build_model(fixed.folder), Arrays.read(fixed.folder)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "classifier.modules_to_save" in name for name in trained)
    assert len(trained) == 2 * 2 * 2 + 2
    batches = [arrays.pooled[0]] * 10
    first = train(model, arrays, batches[:1], 1e-2)
    assert train(model, arrays, batches, 1e-2) < first
