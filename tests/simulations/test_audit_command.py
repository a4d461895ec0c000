"""``fedlora audit`` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.deploy.audit import AUDIT, AuditLog, verify
from simulations.cli import main


def test_a_log_is_verified_by_its_folder_or_its_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / AUDIT
    for number in range(3):
        AuditLog(log).write("answered", round=number)
    for argument in (tmp_path, log):
        assert main(["audit", str(argument)]) == 0
        assert f"3 lines, all as they were written; hash of the last: {verify(log).last}" in capfd.readouterr().out
    log.write_bytes(log.read_bytes().replace(b'"round": 1', b'"round": 7'))
    assert main(["audit", str(tmp_path)]) == 1
    assert "line 3 of 3 is not as it was written" in capfd.readouterr().out
    assert main(["audit", str(tmp_path / "elsewhere")]) == 2
    assert "There is no audit log" in capfd.readouterr().err
