"""``fedlora join --check``: what is said of rows is what is in them; what is forbidden is said before anybody calls."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any, NoReturn

import pandas as pd
import pytest

from fedlora.deploy.code import code_hash
from fedlora.deploy.policy import Policy
from fedlora.errors import InputError
from simulations.cli import main
from simulations.deploy.check import CLIENT, check
from simulations.plan import plan_run
from simulations.tables import human_bytes
from tests.conftest import Compose

LABELS = "data.labels=[bad,good]"


@pytest.fixture
def rows(reviews: Path, tmp_path: Path) -> Path:
    """The 40 first rows, one of which is long."""
    table = pd.read_csv(reviews).head(40)
    table.loc[0, "text"] = "film " * 200
    table.drop(columns="site").to_csv(tmp_path / "rows.csv", index=False)
    return tmp_path / "rows.csv"


def found(findings: list[Any]) -> dict[str, str]:
    return {each.about: each.text for each in findings}


def test_what_is_said_is_what_is_there(tiny: Compose, rows: Path) -> None:
    findings = check(tiny(LABELS, "client.local_epochs=3"), str(rows), Policy())
    assert all(each.fits for each in findings)
    said = found(findings)
    counts = pd.read_csv(rows)["label"].value_counts()
    for label, count in counts.items():
        assert f"'{label}' {count}" in said["labels found"]
    assert said["rows"] == "24 train, 8 validation, 8 test"
    assert "1 of 40 rows are cut at client.max_length = 24" in said["texts"]
    assert code_hash() in said["code"]
    assert "18 local steps of" in said["seconds a round"]
    assert said["policy, of the settings"] == said["policy, of the rows"] == "allows it"


def test_bytes_and_memory_are_those_of_the_plan(tiny: Compose, rows: Path, tmp_path: Path) -> None:
    settings = ["method=fedex", LABELS]  # what it sends depends on how many clients there are
    said = found(check(tiny(*settings), str(rows), Policy()))
    table = pd.read_csv(rows)
    names = [CLIENT, "another 1", "another 2", "another 3"]
    everybody = pd.concat([table.assign(site=name) for name in names])
    everybody.to_csv(tmp_path / "everybody.csv", index=False)
    whole = [f"data.path={tmp_path / 'everybody.csv'}", "data.split.unseen_clients=0", "data.split.public_rows=0"]
    plan = plan_run(tiny(*settings, *whole))
    assert said["bytes a round"].startswith(f"{human_bytes(plan['message_bytes_per_client_round'])} up and down")
    assert "in a round of 4 clients" in said["bytes a round"]
    assert said["memory"].startswith(human_bytes(plan["client_memory_bytes"]))


def test_labels_that_do_not_fit_are_named(tiny: Compose, rows: Path) -> None:
    for labels, fits, text in (
        ("data.labels=[bad]", False, "'good' in the rows"),
        ("data.labels=[bad,fair,good]", True, "no rows of 'fair', which others may have"),
        ("data.labels=null", False, "give data.labels"),
    ):
        (agreed,) = [each for each in check(tiny(labels), str(rows), Policy()) if each.about == "labels agreed on"]
        assert agreed.fits == fits
        assert text in agreed.text


def test_the_policy_is_asked(tiny: Compose, rows: Path) -> None:
    findings = check(tiny(LABELS), str(rows), Policy(max_rounds=2, min_rows=25, runs=["f" * 16]))
    refusals = [each.text for each in findings if not each.fits]
    assert len(refusals) == 2
    assert "policy.max_rounds = 2" in refusals[0]
    assert "policy.min_rows = 25" in refusals[1]
    settings = found(check(tiny(LABELS), str(rows), Policy(runs=["f" * 16])))["policy, of the settings"]
    assert settings == "allows it, if the run's fingerprint is among policy.runs"


def test_a_private_run_says_what_it_costs(tiny: Compose, rows: Path) -> None:
    private = ["privacy=record", "privacy.epsilon=4", "privacy.clip=0.5", "method=ffa"]
    findings = check(tiny(LABELS, *private), str(rows), Policy(max_epsilon=4))
    assert all(each.fits for each in findings)
    assert "of each record: epsilon 3.9" in found(findings)["privacy"]


def test_rows_that_cannot_be_read_are_refused(tiny: Compose, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.txt: its name must end in"):
        check(tiny(LABELS), str(tmp_path / "rows.txt"), Policy())


def test_the_command_needs_no_server_and_no_network(
    tiny_overrides: list[str],
    rows: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "policy.yaml").write_text("max_epsilon: 1\n")
    command = ["join", "--check", "--data", str(rows), *tiny_overrides, "adapter.rank=4"]
    before = set(tmp_path.iterdir())
    assert main([*command, LABELS]) == 0
    assert "seconds a round" in capfd.readouterr().out
    assert main([*command, LABELS, "--policy", "policy.yaml"]) == 2
    assert "NO: refuses: the run has privacy=none" in capfd.readouterr().out
    assert main([*command, LABELS, "--data", "none.csv"]) == 2
    assert main([*command, LABELS, "--policy", "none.yaml"]) == 2
    assert main(["join", "--data", str(rows), LABELS]) == 2
    said = capfd.readouterr().err
    for reason in ("--data none.csv does not exist", "There is no policy none.yaml", "Name the server"):
        assert reason in said
    assert set(tmp_path.iterdir()) == before
