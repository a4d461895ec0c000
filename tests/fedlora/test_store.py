from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.store import ClientRecord, ClientStore, folder_name
from tests.fedlora.helpers import assert_same


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"classifier.weight": torch.full((2, 3), value), "classifier.bias": torch.full((2,), value)}


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path / "clients")


def test_a_client_without_state_has_an_empty_record(store: ClientStore):
    assert store.read("a", 5) == ClientRecord()
    assert store.clients() == []


def test_a_client_reads_its_newest_state_before_the_round(store: ClientStore):
    for server_round in (1, 3, 12):
        store.write("a", server_round, ClientRecord(tensors(server_round), {"setup": f"key-{server_round}"}))
    for server_round, expected in {2: 1, 3: 1, 4: 3, 12: 3, 13: 12, 1000: 12}.items():
        record = store.read("a", server_round)
        assert_same(dict(sorted(record.private.items())), dict(sorted(tensors(expected).items())))
        assert record.references == store.references("a", server_round) == {"setup": f"key-{expected}"}
    assert store.read("a", 1) == ClientRecord()
    assert store.references("a", 1) == {}


def test_a_round_that_is_run_again_starts_from_the_same_state_and_replaces_its_own(store: ClientStore):
    store.write("a", 1, ClientRecord(tensors(1)))
    store.write("a", 2, ClientRecord(tensors(2)))
    assert store.read("a", 2).private["classifier.bias"][0] == 1
    store.write("a", 2, ClientRecord(tensors(7)))
    assert store.read("a", 3).private["classifier.bias"][0] == 7


def test_clients_do_not_see_each_others_state(store: ClientStore):
    names = ["a", "A/B", "A", "../a", "a b", ".hidden", "_shared", "ä", "x" * 200, "x" * 201, "~", "", "a\n", "0"]
    for number, name in enumerate(names):
        store.write(name, 1, ClientRecord(tensors(number)))
    for number, name in enumerate(names):
        assert store.read(name, 2).private["classifier.bias"][0] == number
    assert sorted(store.clients()) == sorted(names)
    assert all(path.is_relative_to(store.folder) for path in store.folder.rglob("*"))


def test_a_client_cannot_be_named_like_the_folder_of_another():
    for name in (".x", "a/b", "x" * 100):
        assert folder_name(folder_name(name)) != folder_name(name)


@given(st.text(max_size=120))
def test_a_folder_name_is_one_visible_path_component(client: str):
    name = folder_name(client)
    assert name == Path(name).name
    assert 0 < len(name.encode()) <= 100
    assert name[0] not in "._ "


@given(st.text(alphabet="ab~./ _%", max_size=4), st.text(alphabet="ab~./ _%", max_size=4))
def test_two_clients_never_share_a_folder(first: str, second: str):
    assert (folder_name(first) == folder_name(second)) == (first == second)


def test_an_ordinary_name_stays_readable():
    assert folder_name("St. Mary's (ward 3), east & west") == "St. Mary's (ward 3), east & west"


def test_shared_content_is_stored_once_under_its_key(store: ClientStore):
    assert not store.has_shared("setup-1")
    store.put_shared("setup-1", tensors(1))
    store.put_shared("setup-1", tensors(2))  # the key is of the content: nothing to do
    assert store.has_shared("setup-1")
    assert store.get_shared("setup-1")["classifier.bias"][0] == 1
    assert store.clients() == []


def test_state_that_is_a_view_is_stored_as_it_looks(store: ClientStore):
    matrix = torch.arange(6.0).reshape(2, 3)
    store.write("a", 1, ClientRecord({"t": matrix.T}))
    store.put_shared("k", {"t": matrix.T})
    assert torch.equal(store.read("a", 2).private["t"], matrix.T)
    assert torch.equal(store.get_shared("k")["t"], matrix.T)


def test_pruning_keeps_what_a_resume_can_read(store: ClientStore):
    for server_round in (1, 3, 5, 8):
        store.write("a", server_round, ClientRecord(tensors(server_round)))
    store.prune("a", 6)
    # A run that resumes after round 6 (or later) reads what it would have read before.
    for server_round, expected in {7: 5, 8: 5, 9: 8}.items():
        assert store.read("a", server_round).private["classifier.bias"][0] == expected
    assert store.read("a", 5) == ClientRecord()
    store.prune("nobody", 6)


def test_pruning_before_the_first_state_removes_nothing(store: ClientStore):
    store.write("a", 4, ClientRecord(tensors(4)))
    store.prune("a", 2)
    assert store.read("a", 5).private["classifier.bias"][0] == 4


def test_collecting_drops_only_what_no_client_refers_to(store: ClientStore):
    for key in ("used", "old", "lost"):
        store.put_shared(key, tensors(0))
    store.write("a", 1, ClientRecord(references={"correction": "old"}))
    store.write("a", 2, ClientRecord(references={"correction": "used"}))
    store.write(".b", 1, ClientRecord(references={"setup": "used"}))
    store.collect()
    assert [store.has_shared(key) for key in ("used", "old", "lost")] == [True, True, False]
    store.prune("a", 2)
    store.collect()
    assert [store.has_shared(key) for key in ("used", "old", "lost")] == [True, False, False]


def test_removing_a_client_leaves_the_others_and_what_they_share(store: ClientStore):
    for key in ("both", "alone"):
        store.put_shared(key, {"x": torch.ones(1)})
    store.write("a", 1, ClientRecord({"x": torch.zeros(1)}, {"setup": "both", "correction": "alone"}))
    store.write("b", 1, ClientRecord({}, {"setup": "both"}))
    store.remove("a")
    assert store.clients() == ["b"]
    assert store.read("a", 2) == ClientRecord()
    assert store.has_shared("both")
    assert not store.has_shared("alone")
    store.remove("who was never there")


def test_an_interrupted_write_leaves_the_old_state(store: ClientStore):
    store.write("a", 1, ClientRecord(tensors(1)))
    (store.folder / "a" / ".round_000002.safetensors.99.tmp").write_bytes(b"half")
    assert store.read("a", 9).private["classifier.bias"][0] == 1
    assert store.clients() == ["a"]
