"""The page for IT departments names every setting of a policy and every event of the log."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedlora.deploy.policy import Policy
from tests.docs.commands import ROOT, files

PAGE = ROOT / "docs" / "it-department.md"


def explained() -> set[str]:
    text = re.sub(r"^```.*?^```", "", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {name for code in re.findall(r"`([^`]+)`", text) for name in code.replace(":", "").split()}


def test_every_setting_of_a_policy_is_explained() -> None:
    assert set(Policy.model_fields) - explained() == set()


def test_every_event_of_the_log_is_explained() -> None:
    source = "".join(path.read_text() for path in (ROOT / "fedlora" / "deploy").glob("*.py"))
    events = set(re.findall(r"audit\.write\(\s*\"(\w+)\"", source))
    assert {"joined", "answered", "refused"} <= events
    assert events - explained() == set()


@pytest.mark.parametrize("name", ["policy.yaml"])
def test_the_example_is_a_policy(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(files(PAGE)[name])
    assert Policy.read(path).max_epsilon == 8
