from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import FedloraError
from fedlora.ledger import COLUMNS, Entry, Ledger

SIZES = st.integers(0, 2**40)
ENTRIES = st.lists(
    st.builds(
        Entry,
        round=st.integers(1, 3),
        client=st.text(st.characters(codec="utf-8"), max_size=5),
        direction=st.sampled_from(["up", "down"]),
        payload=SIZES,
        setup=SIZES,
        message=SIZES,
        transport=SIZES,
        status=st.sampled_from(["ok", "client failed"]),
    ),
    max_size=12,
)


@given(ENTRIES)
def test_the_totals_of_a_run_are_the_sums_of_its_rounds(entries):
    ledger = Ledger(entries)
    rounds = [ledger.round_totals(server_round) for server_round in (1, 2, 3)]
    assert ledger.totals() == {key: sum(totals[key] for totals in rounds) for key in rounds[0]}


def test_totals_are_by_direction_and_setup_is_apart():
    ledger = Ledger(
        [
            Entry(1, "a", "down", payload=100, setup=10, message=150, transport=170),
            Entry(1, "a", "up", payload=90, setup=0, message=95, transport=120),
            Entry(1, "b", "down", payload=100, setup=0, message=140, transport=160),
            Entry(1, "b", "up", payload=0, setup=0, message=64, transport=80, status="out of memory"),
            Entry(2, "a", "up", payload=1000, setup=0, message=1000, transport=1500),
        ]
    )
    assert ledger.round_totals(1) == {
        "payload_up": 90, "payload_down": 200, "message_up": 159, "message_down": 290,
        "transport_up": 200, "transport_down": 330, "setup_bytes": 10,
    }  # fmt: skip
    assert set(ledger.round_totals(7).values()) == {0}


@settings(deadline=None, max_examples=25)
@given(entries=ENTRIES)
def test_a_ledger_that_was_written_is_read_as_it_was(tmp_path_factory, entries):
    path: Path = tmp_path_factory.mktemp("ledger") / "ledger.parquet"
    ledger = Ledger(entries)
    ledger.write(path)
    assert Ledger.read(path).entries == ledger.entries
    assert [file.name for file in path.parent.iterdir()] == ["ledger.parquet"]


def test_a_ledger_of_an_older_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.parquet"
    Ledger([Entry(1, "a", "up", 8, 0, 80, 99)]).frame().drop(columns="transport").to_parquet(path)
    with pytest.raises(FedloraError, match="another version of fedlora: start the run again"):
        Ledger.read(path)


def test_what_the_server_says_to_a_reply_is_counted_with_the_message_it_answers() -> None:
    ledger = Ledger([Entry(1, client, way, 8, 0, 80, 99) for way in ("down", "up") for client in "ab"])
    ledger.acknowledge("b", 7)
    assert [entry.transport for entry in ledger.entries] == [99, 106, 99, 99]
    assert ledger.totals()["transport_down"] == ledger.round_totals(1)["transport_down"] == 205


def test_the_table_has_all_columns_even_without_rows():
    assert tuple(Ledger().frame().columns) == COLUMNS


def test_entries_stay_in_the_order_they_were_made():
    ledger = Ledger()
    for client in ("b", "a", "c"):
        ledger.add(Entry(1, client, "up", 0, 0, 0, 0))
    assert list(ledger.frame()["client"]) == ["b", "a", "c"]


def test_what_was_added_since_a_round_is_found_whatever_came_before() -> None:
    ledger = Ledger(Entry(r, client, "up", r, 0, r, r) for r in (1, 2, 2, 4) for client in "ab")
    assert [entry.round for entry in ledger.since(1).entries] == [2, 2, 2, 2, 4, 4]
    assert ledger.since(4).entries == []
    assert ledger.since(0).totals() == ledger.totals()


def test_only_a_reply_of_the_newest_round_can_be_refused() -> None:
    ledger = Ledger(
        [Entry(1, "a", "up", 8, 0, 80, 99), Entry(2, "b", "up", 8, 0, 80, 99), Entry(2, "b", "down", 8, 0, 80, 99)]
    )
    for server_round, client in ((1, "a"), (2, "a"), (2, "b")):
        ledger.refuse(server_round, client, "late")
    assert [entry.status for entry in ledger.entries] == ["ok", "late", "ok"]


def test_a_reply_that_was_refused_says_why_and_keeps_its_bytes() -> None:
    ledger = Ledger(
        [Entry(1, "a", "down", 8, 0, 90, 99), Entry(1, "a", "up", 8, 0, 80, 99), Entry(1, "b", "up", 8, 0, 80, 99)]
    )
    before = ledger.totals()
    ledger.refuse(1, "a", "refused reply: not finite")
    assert [entry.status for entry in ledger.entries] == ["ok", "refused reply: not finite", "ok"]
    assert ledger.totals() == before
