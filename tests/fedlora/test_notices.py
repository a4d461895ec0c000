from __future__ import annotations

from pathlib import Path

import pandas as pd

from fedlora.federation import Federation
from fedlora.notices import notices
from tests.conftest import Compose


def test_a_sound_run_has_nothing_to_tell(tiny: Compose) -> None:
    assert notices(Federation(tiny())) == []


def test_rows_that_do_not_fit_are_counted(tiny: Compose) -> None:
    federation = Federation(tiny("client.max_length=8"))
    (told,) = notices(federation)
    assert told == f"{federation.rows.truncated} of 240 rows are cut to client.max_length = 8 tokens."
    assert federation.rows.truncated > 0


def test_text_longer_than_the_model_reads_is_cut_to_what_it_reads(tiny: Compose, reviews: Path, tmp_path: Path) -> None:
    rows = pd.read_csv(reviews)
    rows.loc[5, "text"] = "word " * 900
    rows.to_csv(tmp_path / "long.csv", index=False)
    federation = Federation(tiny(f"data.path={tmp_path / 'long.csv'}", "client.max_length=2000"))
    assert federation.max_length == 512
    assert notices(federation) == ["1 of 240 rows are cut to the 512 tokens that the backbone can read."]
    federation.build_model().module(**federation.task.collate(federation.rows, [5]) | {"target": None})


def test_clients_left_out_are_counted(tiny: Compose) -> None:
    (told,) = notices(Federation(tiny("partition.min_rows=20", "cohort.size=2")))
    assert told.startswith("Clients left out because they have fewer than partition.min_rows = 20 rows: ")


def test_labels_that_nobody_trains_on_are_named(tiny: Compose, reviews: Path, tmp_path: Path) -> None:
    federation = Federation(tiny())
    rows = pd.read_csv(reviews)
    rows.loc[rows.site == next(iter(federation.index.unseen)), "label"] = "odd"
    rows.to_csv(tmp_path / "odd.csv", index=False)
    (told,) = notices(Federation(tiny(f"data.path={tmp_path / 'odd.csv'}")))
    assert "No training client has a training row with label 'odd'" in told
