from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from fedlora.seeding import derive_seed, numpy_rng, torch_generator

STREAMS = [
    (7,),
    (8,),
    (7, "batches"),
    (7, "batches", 1),
    (7, "batches", "1"),
    (7, 1, "batches"),
    (7, "batches", 1, "client-1"),
    (7, "batches", 1, "client-2"),
    (7, "batches", 2, "client-1"),
    (7, "ab", "c"),
    (7, "a", "bc"),
    (7, ""),
    (7, "", ""),
    (7, 7),
]


def numpy_draw(stream: tuple) -> list[int]:
    return numpy_rng(*stream).integers(0, 2**62, size=4).tolist()


def torch_draw(stream: tuple) -> list[int]:
    return torch.randint(0, 2**62, (4,), generator=torch_generator(*stream)).tolist()


def global_numpy_state() -> tuple[list[int], int]:
    state = np.random.get_state(legacy=False)["state"]
    return state["key"].tolist(), state["pos"]


@pytest.mark.parametrize("draw", [numpy_draw, torch_draw])
def test_the_same_keys_give_the_same_draws(draw):
    for stream in STREAMS:
        assert draw(stream) == draw(stream)


@pytest.mark.parametrize("draw", [numpy_draw, torch_draw])
def test_different_seeds_keys_key_types_and_key_orders_give_different_draws(draw):
    draws = [tuple(draw(stream)) for stream in STREAMS]

    assert len(set(draws)) == len(STREAMS)


def test_a_stream_does_not_depend_on_what_was_drawn_before():
    alone = numpy_draw((3, "cohort", 5))
    for earlier in range(5):
        numpy_draw((3, "cohort", earlier))

    assert numpy_draw((3, "cohort", 5)) == alone


def test_seeds_are_63_bits_and_stay_the_same_across_processes_and_versions():
    assert all(0 <= derive_seed(*stream) < 2**63 for stream in STREAMS)
    assert derive_seed(7, "batches", 3, "client-1") == 5964575254929798230


def test_the_global_generators_are_untouched():
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    numpy_state = global_numpy_state()

    numpy_draw((7, "batches"))
    torch_draw((7, "batches"))

    assert random.getstate() == random_state
    assert global_numpy_state() == numpy_state
    assert torch.equal(torch.get_rng_state(), torch_state)
