"""A deployed client does what its owner allows and no more, and its log says what left; in one process, no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from flwr.app import Message, MessageType, RecordDict

from fedlora import wire
from fedlora.client import Worker, instruct
from fedlora.config import Config
from fedlora.deploy.audit import AUDIT, verify
from fedlora.deploy.client import IDENTITY, DeployedClient, Home
from fedlora.deploy.code import code_hash
from fedlora.deploy.datasets import server_dataset
from fedlora.deploy.policy import Policy
from fedlora.deploy.terms import TERMS, Terms, terms_of
from fedlora.federation import Federation, task_of
from fedlora.grid import node_of, reason_of
from fedlora.protocol import GRADIENTS
from fedlora.store import ClientStore
from tests.conftest import Compose
from tests.fedlora.helpers import request

CLIENT = "site 00"
RECORD = ["privacy=record", "privacy.epsilon=20", "privacy.clip=0.5", "method=ffa", "client.local_steps=1"]


@dataclass
class Site:
    """One client, what its server says, and where it keeps what it must not forget.

    Attributes:
        folder: of the client.
        rows: its file.
        config: of the server.
        server: the worker of the server.
    """

    folder: Path
    rows: Path
    config: Config
    server: Worker

    def client(self, **policy: Any) -> DeployedClient:
        """A new process of the client, so to say."""
        path = self.server.federation.config.backbone.path
        return DeployedClient(Home(self.folder, CLIENT, str(self.rows), {}, path, Policy(**policy)))

    @property
    def terms(self) -> Terms:
        return terms_of(self.server, "run-1")

    def meet(self, client: DeployedClient, terms: Terms | None = None) -> str | None:
        """Why the client does not take part."""
        content = RecordDict({TERMS: (terms or self.terms).record()})
        reply = client.handle(Message(content, node_of(CLIENT), MessageType.QUERY))
        refused = reply.content[IDENTITY].get("refused")
        return None if refused is None else str(refused)

    def train(self, client: DeployedClient, server_round: int = 1, **more: Any) -> Message:
        """The answer to a message that asks for training."""
        arrays = None if GRADIENTS in more else wire.pack(self.server.model.read(self.server.layout(CLIENT)))
        return client.handle(request(node_of(CLIENT), arrays, **instruct(CLIENT, server_round, **more)))

    @property
    def log(self) -> list[dict[str, Any]]:
        """The audit log, which is whole."""
        path = self.folder / AUDIT
        assert verify(path).broken is None
        return [json.loads(line) for line in path.read_text().splitlines()]


MakeSite = Callable[..., Site]


@pytest.fixture
def site(tiny: Compose, tmp_path: Path) -> MakeSite:
    def make(*settings: str) -> Site:
        config = tiny("cohort.size=2", "data.labels=[bad,good]", *settings)
        assert config.data.path is not None
        table = pd.read_csv(config.data.path)
        rows, others = tmp_path / "rows.csv", tmp_path / "server.csv"
        table[table["site"] == CLIENT].to_csv(rows, index=False)
        table[table["site"] != CLIENT].to_csv(others, index=False)
        data = config.data.model_copy(update={"path": str(others)})
        config = config.model_copy(update={"data": data, "run_dir": str(tmp_path / "run")})
        federation = Federation(config, server_dataset(config, task_of(config), [CLIENT, "site 01"]))
        server = Worker(federation, ClientStore(tmp_path / "server"))
        return Site(tmp_path / "home", rows, config, server)

    return make


def test_what_happens_is_in_the_log_and_every_byte_is_counted(site: MakeSite) -> None:
    here = site()
    client = here.client()
    assert here.meet(client) is None
    reply = here.train(client)
    assert not reply.has_error(), reason_of(reply)
    log = here.log
    assert [line["event"] for line in log] == [
        "received", "agreed", "answered", "received", "training", "answered",
    ]  # fmt: skip
    assert log[1]["terms"] == here.terms.fingerprint
    assert log[3]["round"] == 1
    assert log[5]["metrics"] == dict(reply.content["metrics"])
    assert log[5]["bytes"] == wire.message_bytes(reply)
    used = client.guard.allowance.used("run-1")
    assert used.upload == sum(line["bytes"] for line in log if line["event"] == "answered")
    assert used.download == sum(line["bytes"] for line in log if line["event"] == "received")
    assert used.trainings == 1


@pytest.mark.parametrize(
    "settings", [["method=fed_sb"], ["method=ravan"], ["method=flora"], RECORD], ids=lambda s: s[0]
)
def test_methods_are_joined_that_need_what_only_the_server_has(site: MakeSite, settings: list[str]) -> None:
    here = site(*settings)
    assert here.meet(here.client()) is None


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ({"privacy": "record"}, "policy.privacy = record"),
        ({"max_rounds": 2}, "policy.max_rounds = 2"),
        ({"min_rows": 1000}, "policy.min_rows = 1000"),
        ({"runs": ["another"]}, "policy.runs"),
        ({"code": ["another"]}, "policy.code"),
    ],
)
def test_a_run_that_the_policy_does_not_allow_is_not_joined(
    site: MakeSite, policy: dict[str, Any], reason: str
) -> None:
    here = site()
    client = here.client(**policy)
    refused = here.meet(client)
    assert refused is not None
    assert reason in refused
    assert here.log[-1]["event"] == "refused"
    assert reason in here.log[-1]["reason"]
    assert "not agreed" in reason_of(here.train(client))


def test_a_run_is_joined_by_its_fingerprint_and_the_code_by_its_hash(site: MakeSite) -> None:
    here = site()
    assert here.meet(here.client(runs=[here.terms.fingerprint], code=[code_hash()])) is None


def test_code_that_the_owner_has_not_named_is_never_imported(site: MakeSite, tmp_path: Path) -> None:
    here = site()
    planted = tmp_path / "planted.py"
    planted.write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')")
    said = here.terms
    config = json.loads(said.config)
    config["task"]["name"] = f"{planted}:Task"
    forged = Terms(**{**vars(said), "config": json.dumps(config)})
    refused = here.meet(here.client(), forged)
    assert refused is not None
    assert "policy.plugins" in refused
    assert not (tmp_path / "it ran").exists()


def test_counters_and_limits_survive_a_restart(site: MakeSite) -> None:
    here = site("rounds=2")
    limits = {"max_rounds": 2}
    first = here.client(**limits)
    assert here.meet(first) is None
    assert not here.train(first, 1).has_error()
    second = here.client(**limits)  # another process: it reads the terms that were agreed on
    assert not here.train(second, 2).has_error()
    third = here.client(**limits)
    assert "trained as often as its policy.max_rounds = 2" in reason_of(here.train(third, 2))
    assert here.log[-1]["event"] == "refused"
    assert third.guard.allowance.used("run-1").trainings == 2


def test_a_stricter_policy_holds_from_the_next_start_on(site: MakeSite) -> None:
    here = site()
    assert here.meet(here.client()) is None
    assert "policy.privacy = client" in reason_of(here.train(here.client(privacy="client", trust_server_noise=True)))


def test_what_would_be_too_many_bytes_does_not_leave(site: MakeSite) -> None:
    here = site()
    free = here.client()
    assert here.meet(free) is None
    answered = here.log[-1]["bytes"]
    size = wire.message_bytes(here.train(free))
    used = free.guard.allowance.used("run-1")
    assert used.upload == answered + size
    full = here.client(max_upload_bytes=used.upload + size - 1)
    reply = here.train(full, 2)
    assert "policy.max_upload_bytes" in reason_of(reply)
    assert full.guard.allowance.used("run-1").upload == used.upload
    assert not here.train(here.client(max_upload_bytes=used.upload + size), 2).has_error()
    reply = here.train(here.client(max_download_bytes=used.download), 3)
    assert "policy.max_download_bytes" in reason_of(reply)


def test_only_the_numbers_that_may_leave_do(site: MakeSite) -> None:
    here = site(*RECORD)
    client = here.client(privacy="record", max_epsilon=20, metrics=["epsilon"])
    assert here.meet(client) is None
    reply = here.train(client)
    assert not reply.has_error(), reason_of(reply)
    metrics = dict(reply.content["metrics"])
    assert set(metrics) == {"num-examples", "epsilon"}
    assert metrics["num-examples"] == 1
    assert here.log[-1]["metrics"] == metrics
    assert client.guard.allowance.used("run-1").epsilon == 20
    assert "together with this client's other runs" in str(
        here.meet(client, Terms(**{**vars(here.terms), "run": "run-2"}))
    )


@pytest.mark.parametrize("allowed", [False, True])
def test_gradients_of_rows_leave_only_if_the_owner_says_so(site: MakeSite, allowed: bool) -> None:
    here = site("method=fed_sb", "adapter.basis=client_gradient")
    assert here.meet(here.client(allow_client_gradients=True)) is None
    reply = here.train(here.client(allow_client_gradients=allowed), 0, **{GRADIENTS: True})
    assert reply.has_error() == (not allowed)
    if not allowed:
        assert "allow_client_gradients" in reason_of(reply)
    assert ("gradients" in [line["event"] for line in here.log]) == allowed


def test_gradients_that_a_run_has_no_use_for_never_leave(site: MakeSite) -> None:
    here = site(*RECORD)
    client = here.client(allow_client_gradients=True)
    assert here.meet(client) is None
    assert "no use for" in reason_of(here.train(client, 0, **{GRADIENTS: True}))


@pytest.mark.parametrize("names", [{"client-id": "site 01"}, {"pool": ["site 01"]}, {"pool": [CLIENT, "site 01"]}])
def test_a_client_spends_its_own_budget_only(site: MakeSite, names: dict[str, Any]) -> None:
    here = site(*RECORD)
    client = here.client()
    assert here.meet(client, Terms(**{**vars(here.terms), "clients": (CLIENT, "site 01")})) is None
    asked = {**instruct(CLIENT, 1), **names}
    arrays = wire.pack(here.server.model.read(here.server.layout(CLIENT)))
    assert "trains for nobody else" in reason_of(client.handle(request(node_of(CLIENT), arrays, **asked)))
    assert not here.train(client, 1, pool=[CLIENT]).has_error()


def test_no_row_is_written_anywhere(site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    here = site()
    client = here.client()
    assert here.meet(client) is None
    assert not here.train(client).has_error()
    assert not (tmp_path / "cache").exists()
    pieces = {" ".join(text.split()[:3]).encode() for text in pd.read_csv(here.rows)["text"]}
    written = [path for path in here.folder.rglob("*") if path.is_file()]
    assert written
    assert [path for path in written for piece in pieces if piece in path.read_bytes()] == []


def test_what_is_wrong_with_the_rows_is_said_at_home_only(site: MakeSite, caplog: pytest.LogCaptureFixture) -> None:
    here = site()
    table = pd.read_csv(here.rows)
    table.loc[3, "label"] = "secret diagnosis"
    table.to_csv(here.rows, index=False)
    assert here.meet(here.client()) == "its rows do not suit the run; the client's own log says why"
    assert "secret diagnosis" in caplog.text
    assert "secret" not in (here.folder / AUDIT).read_text()


def test_a_budget_that_cannot_be_kept_is_refused_without_the_number_of_rows(site: MakeSite) -> None:
    here = site(*RECORD, "privacy.delta=0.9")
    refused = here.meet(here.client())
    assert refused is not None
    assert "privacy.delta = 0.9 cannot be kept" in refused
    assert str(int(0.6 * len(pd.read_csv(here.rows)))) not in refused


def test_an_unforeseen_failure_says_nothing_of_the_rows_to_anybody_else(site: MakeSite) -> None:
    here = site()
    client = here.client()
    assert here.meet(client) is None
    here.rows.unlink()
    reason = reason_of(here.train(here.client()))
    assert "own log says" in reason
    assert str(here.rows) not in reason
    assert str(here.rows) not in (here.folder / AUDIT).read_text()
