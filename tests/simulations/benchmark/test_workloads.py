"""Workloads by name, by grid and by scale."""

from __future__ import annotations

import pytest

from fedlora.errors import InputError
from simulations.benchmark import variants
from simulations.benchmark.workloads import NAMED, Workload, chosen, grid, size_of


def test_a_name_means_that_workload_and_a_first_word_means_all_that_begin_with_it() -> None:
    assert [w.name for w in chosen(NAMED, ["small"])] == ["small"]
    assert [w.name for w in chosen(NAMED, ["overhead"])] == ["overhead-4x48", "overhead-4x16", "overhead-1x16"]
    assert chosen(NAMED, []) == NAMED
    with pytest.raises(InputError, match="There is no workload 'large'"):
        chosen(NAMED, ["large"])


def test_scale_changes_the_number_of_clients_alone() -> None:
    scaled = NAMED[0].scaled(0.25)
    assert (scaled.clients, scaled.steps, scaled.rows, scaled.length) == (32, 4, 4, 48)
    assert Workload("w", 3, 1, 1).scaled(0.01).clients == 2


def test_a_grid_has_every_combination_under_a_name_of_its_own() -> None:
    found = grid([1, 2], [4], [4, 16], [48], ["minilm", "2x128"], real=True)
    assert len({w.name for w in found}) == 8
    assert {(w.clients, w.rows, w.backbone) for w in found} == {
        (c, r, b) for c in (1, 2) for r in (4, 16) for b in ("minilm", "2x128")
    }


def test_a_random_backbone_is_layers_by_hidden_size() -> None:
    assert size_of("2x128") == (2, 128)
    for wrong in ("bert", "2x", "2x100", "minilm"):
        with pytest.raises(InputError, match="neither minilm nor"):
            size_of(wrong)


def test_variants_are_unique_and_their_baselines_exist() -> None:
    names = [variant.name for variant in variants.VARIANTS]
    assert len(set(names)) == len(names)
    for variant in variants.VARIANTS:
        assert variants.loop_of(variant) in names
        assert variant.same_loss_as in names
        assert variants.own_central_of(variant) in (*names, None)
    assert [v.name for v in variants.chosen(["loop", "central"])] == ["central", "loop"]
    with pytest.raises(InputError, match="Did you mean 'cohort'"):
        variants.chosen(["cohrt"])
