"""The audit log of a client: one JSON object a line, each with the hash of the line before.

Lines are only added, and are on the disk before what they are about goes on. A small file beside it holds the number
of lines and the hash of the last, so that a log cut short shows, too. Whoever can rewrite both files whole can still
forge them: note the hash of the last line elsewhere now and then.
"""

from __future__ import annotations

import datetime
import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

AUDIT = "audit.jsonl"
"""The log in a client's folder."""
FIRST = "0" * 64
"""In place of the hash of a line before the first."""
TORN = "a line was cut short"
"""The event with which a log goes on behind a line that was cut by a crash."""
TAIL = 1 << 16


@dataclass(frozen=True)
class Verdict:
    """What :func:`verify` finds.

    Attributes:
        lines: whole lines.
        broken: number, from 1, of the first line that is not as it was written, or that is missing; ``None``: none.
        reason: what is wrong with it, or what a crash has left behind; empty if nothing.
        last: hash of the last whole line.
    """

    lines: int
    broken: int | None
    reason: str
    last: str

    def __str__(self) -> str:
        if self.broken is not None:
            return f"line {self.broken} of {self.lines} is not as it was written: {self.reason}"
        note = f" ({self.reason})" if self.reason else ""
        return f"{self.lines} lines, all as they were written{note}; hash of the last: {self.last}"


class AuditLog:
    """The log of one client, to which any number of its processes write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, event: str, **fields: Any) -> None:
        """Add a line: ``event`` and whatever JSON can say about it. It is on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            previous, torn = _last_line(file)
            if torn:
                file.write(b"\n")
                if _parsed(previous) is None:
                    previous = _add(file, previous, {"event": TORN})
            last = _add(file, previous, {"event": event, **fields})
            file.flush()
            os.fsync(file.fileno())
            self._note_head(file, last)

    def _note_head(self, file: BinaryIO, last: bytes) -> None:
        from fedlora.store import write_atomically

        file.seek(0)
        lines = sum(block.count(b"\n") for block in iter(lambda: file.read(TAIL), b""))
        write_atomically(head_of(self.path), json.dumps({"lines": lines, "last": _hash(last)}))


def head_of(path: Path) -> Path:
    """The file beside the log ``path`` that knows its last line."""
    return path.with_name(f"{path.name}.head")


def verify(path: Path) -> Verdict:
    """Check a log: any line that was edited, removed, added or moved is found.

    A last line that was cut by a crash is no fault; the reason says so.
    """
    content = path.read_bytes() if path.exists() else b""
    *whole, rest = content.split(b"\n")
    previous = FIRST
    for number, line in enumerate(whole, start=1):
        parsed = _parsed(line)
        if parsed is None:
            following = _parsed(whole[number]) if number < len(whole) else None
            if following is None or following.get("event") != TORN:
                return Verdict(len(whole), number, "it cannot be read", previous)
        elif parsed.get("previous") != previous:
            return Verdict(len(whole), number, "it does not follow from the line before", previous)
        previous = _hash(line)
    hashes = [_hash(line) for line in whole]
    head = _head(path)
    if head is None:
        known, last = (0, FIRST) if len(whole) <= 1 else (-1, "")
    else:
        known, last = head
    if known < 0:
        return Verdict(len(whole), len(whole) + 1, f"{head_of(path).name} is missing", previous)
    if known > len(whole):
        return Verdict(len(whole), len(whole) + 1, f"it is missing: there were {known} lines", previous)
    if known and hashes[known - 1] != last:
        return Verdict(len(whole), known, f"it is not the one that {head_of(path).name} knows", previous)
    if len(whole) - known > 3:  # a crash leaves out the note about a line, with one that was cut short before it
        return Verdict(len(whole), known + 4, f"it was added behind the {known} lines that were noted", previous)
    return Verdict(len(whole), None, "the last line was cut by a crash" if rest else "", previous)


def _head(path: Path) -> tuple[int, str] | None:
    try:
        values = json.loads(head_of(path).read_text())
        return int(values["lines"]), str(values["last"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _add(file: BinaryIO, previous: bytes | None, values: dict[str, Any]) -> bytes:
    """Write a line behind the line ``previous`` and return it."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    line = {"time": now, **values, "previous": FIRST if previous is None else _hash(previous)}
    text = json.dumps(line, default=str).encode()
    file.write(text + b"\n")
    return text


def _last_line(file: BinaryIO) -> tuple[bytes | None, bool]:
    """The last line without its end, and whether its end is missing."""
    end = file.seek(0, os.SEEK_END)
    size, tail = TAIL, b""
    while end:
        start = max(0, end - size)
        file.seek(start)
        tail = file.read(end - start)
        if start == 0 or b"\n" in tail[:-1]:
            break
        size *= 2
    if not tail:
        return None, False
    torn = not tail.endswith(b"\n")
    return (tail if torn else tail[:-1]).rpartition(b"\n")[2], torn


def _parsed(line: bytes | None) -> dict[str, Any] | None:
    try:
        values = json.loads(line or b"")
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
