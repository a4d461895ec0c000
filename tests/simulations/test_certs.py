"""``fedlora certs`` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedlora.deploy.keys import certificate_fingerprint, fingerprint
from simulations.cli import main


def test_a_server_and_a_client_are_told_what_to_do_with_their_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["certs", "server", "certs", "--host", "fl.example.org, 10.0.0.5", "--days", "30"]) == 0
    said = capsys.readouterr().out
    assert "fl.example.org, 10.0.0.5" in said
    assert certificate_fingerprint(tmp_path / "certs" / "ca.crt") in said
    made = {path.name for path in (tmp_path / "certs").iterdir()}
    assert made == {"ca.crt", "ca.key", "server.pem", "server.key", "clients"}
    assert all(name in said for name in made)

    assert main(["certs", "client", "site-a"]) == 0
    said = capsys.readouterr().out
    assert fingerprint((tmp_path / "site-a.pub").read_bytes()) in said
    assert "--key site-a" in said


def test_nothing_is_made_twice(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["certs", "client", "site-a"], ["certs", "server", "certs", "--host", "localhost"]):
        assert main(command) == 0
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert main(command) == 2
        assert "is there already" in capfd.readouterr().err
        assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
