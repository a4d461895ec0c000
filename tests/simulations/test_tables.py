"""Tables print what they must, whole."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from simulations import tables
from simulations.plan import list_methods, plan_run
from simulations.simulate import start
from tests.conftest import Compose


def printed(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(table)
    return out.getvalue()


@pytest.mark.parametrize("basis", ["gradient", "weight", "seeded"])
def test_every_table_prints_the_basis_of_fed_sb(tiny: Compose, tmp_path: Path, basis: str) -> None:
    config = tiny("method=fed_sb", f"adapter.basis={basis}", "rounds=1")
    assert f"fed_sb[{basis}]" in printed(tables.plans([plan_run(config)], 10.0))
    assert f"fed_sb[{basis}]" in printed(tables.comparison([start(config, tmp_path / "run")]))


def test_one_seed_is_called_a_demonstration_and_several_are_not(tiny: Compose, tmp_path: Path) -> None:
    one, two, other = (
        start(tiny(f"method={method}", "rounds=1", f"seed={seed}"), tmp_path / f"{method}-{seed}")
        for method, seed in (("zero_shot", 1), ("local", 1), ("local", 2))
    )
    assert "a demonstration, not a ranking" in str(tables.caption([one, two]))
    assert "a demonstration" not in str(tables.caption([one, other]))


def test_methods_are_listed_with_their_exactness() -> None:
    text = printed(tables.methods(list_methods()))
    assert "approximate" in text
    assert "exact" in text


def test_bytes_are_shown_in_decimal_units() -> None:
    assert [tables.human_bytes(count) for count in (0, 999, 1000, 1_234_567)] == ["0 B", "999 B", "1.0 kB", "1.2 MB"]
