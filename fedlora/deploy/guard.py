"""What stands between a server and a client's worker: policy, counters and audit log, around every message."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message, MetricRecord

from fedlora.config import Config
from fedlora.deploy.allowance import Allowance
from fedlora.deploy.audit import AUDIT, AuditLog
from fedlora.deploy.code import code_hash
from fedlora.deploy.policy import Policy
from fedlora.deploy.terms import Terms
from fedlora.wire import message_bytes


class Guard:
    """The guard of one client.

    Attributes:
        policy: what the owner allows.
        audit: what has happened.
        allowance: what has been given away.
    """

    def __init__(self, folder: Path, policy: Policy) -> None:
        self.policy = policy
        self.audit = AuditLog(folder / AUDIT)
        self.allowance = Allowance(folder)

    def check_run(self, terms: Terms, config: Config) -> None:
        """See whether a run may be joined, before anything of it is loaded.

        Raises:
            PolicyError: it may not.
        """
        self.policy.check_run(config, terms.fingerprint, code_hash())

    def check_rows(self, terms: Terms, config: Config, rows: int) -> None:
        """See whether a run may be joined with so many training rows.

        Raises:
            PolicyError: it may not.
        """
        self.policy.check_rows(config, rows, self.allowance.elsewhere(terms.run))

    def received(self, run: str, message: Message) -> None:
        """Note a message before anything is done about it.

        Raises:
            PolicyError: more has come in this run than may.
        """
        size, asked = message_bytes(message), message.content.get("config") or {}
        self.audit.write(
            "received", run=run, type=message.metadata.message_type, round=asked.get("server-round"), bytes=size
        )
        with self.allowance.changing(run) as used:
            used.download += size
        self.policy.check_bytes(used)

    def admit_gradients(self, run: str) -> None:
        """See whether gradients may be sent as they are, and note it.

        Raises:
            PolicyError: they may not.
        """
        self.policy.check_gradients()
        self.audit.write("gradients", run=run)

    def admit_training(self, run: str, config: Config, rows: int, asked: Mapping[str, Any]) -> None:
        """See whether a round may be trained, count it and note what the run costs.

        Raises:
            PolicyError: it may not.
        """
        with self.allowance.changing(run) as used:
            self.policy.check_training(config, rows, used, self.allowance.elsewhere(run), asked)
        self.audit.write(
            "training",
            run=run,
            round=asked["server-round"],
            trainings=used.trainings,
            epsilon_bound=used.epsilon or None,
        )

    def answered(self, run: str, reply: Message) -> Message:
        """``reply`` without the numbers that may not leave, counted and noted.

        Raises:
            PolicyError: more would leave in this run than may; nothing is counted then.
        """
        metrics = reply.content.get("metrics")
        said: dict[str, Any] = {}
        if isinstance(metrics, MetricRecord):
            said = self.policy.filtered(metrics)
            reply.content["metrics"] = MetricRecord(said)
        size = message_bytes(reply)
        with self.allowance.changing(run) as used:
            used.upload += size
            self.policy.check_bytes(used)
        self.audit.write("answered", run=run, bytes=size, metrics=said, records=sorted(reply.content))
        return reply

    def refused(self, run: str, reason: str, reply: Message) -> Message:
        """``reply``, an error or a refusal for ``reason``, noted."""
        self.audit.write("refused", run=run, reason=reason, bytes=message_bytes(reply))
        return reply
