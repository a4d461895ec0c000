"""The audit log: whatever is done to a line is found, and what a crash does is told apart from that."""

from __future__ import annotations

import json
import multiprocessing
from functools import cache
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.deploy.audit import FIRST, TORN, AuditLog, head_of, verify

EVENTS = [("joined", {"server": "fl.example.org"}), ("received", {"round": 1, "bytes": 12}), ("answered", {"round": 1}),
          ("refused", {"reason": "mäßig\nviel"}), ("answered", {"round": 1})]  # fmt: skip


def written(folder: Path) -> Path:
    path = folder / "audit.jsonl"
    for event, fields in EVENTS:
        AuditLog(path).write(event, **fields)
    return path


@cache
def content() -> tuple[bytes, bytes]:
    """A log and its note."""
    with TemporaryDirectory() as folder:
        path = written(Path(folder))
        return path.read_bytes(), head_of(path).read_bytes()


def test_lines_say_what_they_were_given_in_order(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in written(tmp_path).read_text().splitlines()]
    assert [(line.pop("event"), line) for line in lines] == [
        (event, {**fields, "time": line["time"], "previous": line["previous"]})
        for (event, fields), line in zip(EVENTS, lines, strict=True)
    ]
    assert lines[0]["previous"] == FIRST
    assert [line["time"] for line in lines] == sorted(line["time"] for line in lines)


def test_an_untouched_log_is_whole(tmp_path: Path) -> None:
    path = written(tmp_path)
    verdict = verify(path)
    assert (verdict.lines, verdict.broken, verdict.reason) == (5, None, "")
    assert json.loads(head_of(path).read_text()) == {"lines": 5, "last": verdict.last}
    assert verify(tmp_path / "none.jsonl").broken is None


def changed(lines: list[bytes], data: st.DataObject) -> tuple[list[bytes], int]:
    """The lines after some tampering, and the number of the first that is not what was written there."""
    kind = data.draw(st.sampled_from(["edit", "remove", "swap", "repeat", "insert", "cut"]))
    place = data.draw(st.integers(0, len(lines) - 1))
    before = list(lines)
    if kind == "edit":
        at = data.draw(st.integers(0, len(lines[place]) - 1))
        byte = data.draw(st.integers(32, 126).filter(lambda each: each != lines[place][at]))
        lines[place] = lines[place][:at] + bytes([byte]) + lines[place][at + 1 :]
    elif kind == "remove":
        del lines[place]
    elif kind == "swap":
        other = data.draw(st.integers(0, len(lines) - 1).filter(lambda each: each != place))
        lines[place], lines[other] = lines[other], lines[place]
    elif kind == "repeat":
        lines.insert(place, lines[data.draw(st.integers(0, len(lines) - 1))])
    elif kind == "insert":
        lines.insert(place, json.dumps({"event": "answered", "previous": FIRST}).encode())
    else:
        del lines[place:]
    same = [old == new for old, new in zip(before, lines, strict=False)]
    return lines, (same.index(False) if False in same else len(same)) + 1


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_edit_removal_and_move_is_found(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "audit.jsonl"
        log, head = content()
        head_of(path).write_bytes(head)
        lines, first = changed(log.splitlines(), data)
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        broken = verify(path).broken
        assert broken is not None
        assert broken - 1 <= first <= broken + 1  # a line shows by that of the one behind it


def test_the_last_line_is_known_by_the_note(tmp_path: Path) -> None:
    path = written(tmp_path)
    *lines, last = path.read_bytes().splitlines(keepends=True)
    for tampered, reason in ((b"", "it is missing: there were 5"), (last.replace(b"ans", b"Ans"), "audit.jsonl.head")):
        path.write_bytes(b"".join([*lines, tampered]))
        verdict = verify(path)
        assert verdict.broken == 5
        assert reason in verdict.reason


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 400))
def test_a_last_line_cut_by_a_crash_is_tolerated_and_told(cut: int) -> None:
    with TemporaryDirectory() as folder:
        path = written(Path(folder))
        head = head_of(path).read_bytes()
        AuditLog(path).write("answered", note="x" * 300)
        whole = path.read_bytes()
        start = whole.rstrip(b"\n").rfind(b"\n") + 1
        path.write_bytes(whole[: min(start + cut, len(whole) - 1)])  # its note was not written, either
        head_of(path).write_bytes(head)
        verdict = verify(path)
        assert (verdict.lines, verdict.broken, verdict.reason) == (5, None, "the last line was cut by a crash")
        AuditLog(path).write("joined")
        verdict = verify(path)
        assert (verdict.broken, verdict.reason) == (None, "")
        events: list[Any] = [json.loads(line)["event"] for line in path.read_bytes().splitlines()[6:]]
        assert events in ([TORN, "joined"], ["joined"])  # the cut may have taken the line's end only


def test_a_crash_before_the_note_is_tolerated(tmp_path: Path) -> None:
    path = written(tmp_path)
    head = head_of(path).read_bytes()
    AuditLog(path).write("answered")
    head_of(path).write_bytes(head)
    assert verify(path).broken is None
    first = tmp_path / "first.jsonl"
    AuditLog(first).write("joined")
    head_of(first).unlink()
    assert verify(first).broken is None


def test_a_missing_note_and_a_torn_line_that_nobody_has_noticed_are_found(tmp_path: Path) -> None:
    path = written(tmp_path)
    head_of(path).unlink()
    verdict = verify(path)
    assert (verdict.broken, verdict.reason) == (6, "audit.jsonl.head is missing")
    path.write_bytes(path.read_bytes() + b'{"event": "ans\n')
    assert verify(path).broken == 6


def write_many(path: Path, name: str, together: Barrier) -> None:
    together.wait(60)
    for number in range(100):
        AuditLog(path).write(name, number=number)


def test_processes_of_one_client_do_not_mix_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2)
    processes = [context.Process(target=write_many, args=(path, name, together)) for name in ("one", "two")]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert (verify(path).lines, verify(path).broken) == (200, None)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for name in ("one", "two"):
        assert [line["number"] for line in lines if line["event"] == name] == list(range(100))
