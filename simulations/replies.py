"""What comes back in a round: who failed and why, whose updates count, and what clients say they have spent."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import cast

from flwr.app import Message

from fedlora.config import Config
from fedlora.errors import FedloraError, InputError
from fedlora.grid import NOT_NEEDED, ClientGrid, reason_of
from fedlora.ledger import Ledger
from fedlora.privacy.budget import SITS_OUT
from fedlora.protocol import EPSILON

log = logging.getLogger("fedlora")


class Replies:
    """The rules of a run for what comes back.

    Attributes:
        enough: how many usable replies of a round count where spares are asked; ``None``: all.
    """

    def __init__(self, config: Config, ledger: Ledger) -> None:
        self.ledger = ledger
        self.enough = config.cohort.size if config.cohort.spares else None
        self.least = config.cohort.min_replies
        self.secret = config.privacy.secret_cohort

    def failures(self, server_round: int, failed: dict[str, str], asked: int) -> dict[str, str]:
        """Note which clients failed and why, and return that.

        Raises:
            FedloraError: all that were ``asked`` did, and ``cohort.min_replies`` does not say that the run goes on; or
                they did so before the first round, which needs them.
        """
        for client, reason in failed.items():
            self.ledger.refuse(server_round, client, reason)
        told = nameless(failed) if self.secret else failed
        for client, reason in told.items():
            log.warning("round %d: client '%s' failed: %s", server_round, client, reason)
        broken = {client: reason for client, reason in told.items() if not reason.startswith(SITS_OUT)}
        if broken and len(failed) == asked and (self.least is None or server_round == 0):
            client, reason = next(iter(broken.items()))
            kind = InputError if reason.startswith("the loss is") else FedloraError
            raise kind(f"Round {server_round}: every client failed. Client '{client}': {reason}.")
        return failed

    def counted(self, server_round: int, replies: Sequence[Message], grid: ClientGrid) -> list[Message]:
        """The replies that the strategy gets: errors, and the first :attr:`enough` others in cohort order.

        So which of them count does not depend on how fast an engine is, and spares come last.
        """
        kept, usable = [], 0
        for reply in replies:
            usable += reply.has_content()
            if reply.has_content() and self.enough is not None and usable > self.enough:
                self.ledger.refuse(server_round, grid.client_of(reply.metadata.src_node_id), NOT_NEEDED)
            else:
                kept.append(reply)
        return kept

    def too_few(self, server_round: int, replies: Sequence[Message]) -> str | None:
        """Why a round leaves the global state as it is, where fewer clients answered than must."""
        usable = sum(reply.has_content() for reply in replies)
        if self.least is None or usable >= self.least:
            return None
        reason = f"skipped: {usable} usable replies, and cohort.min_replies = {self.least}"
        log.warning("round %d: %s", server_round, reason)
        return reason


def alike(replies: Sequence[Message]) -> Sequence[Message]:
    """Replies with the metrics that all of them have: strategies of Flower end the run where one keeps its loss."""
    records = [reply.content.metric_records["metrics"] for reply in replies if reply.has_content()]
    common = set(records[0]).intersection(*records) if records else set()
    for record in records:
        for name in set(record) - common:
            del record[name]
    return replies


def failed_in(replies: Sequence[Message], grid: ClientGrid) -> dict[str, str]:
    """Why clients failed, by client; who was only not waited for has not."""
    reasons = {grid.client_of(r.metadata.src_node_id): reason_of(r) for r in replies if r.has_error()}
    return {client: reason for client, reason in reasons.items() if reason != NOT_NEEDED}


def nameless(failures: Mapping[str, str]) -> dict[str, str]:
    """Failures without the ids of the clients, where nobody may learn who took part in the round."""
    reasons = [reason.replace(f"'{client}'", "'?'") for client, reason in failures.items()]
    return {f"? {number}": reason for number, reason in enumerate(reasons, 1)}


def spent_by(replies: Sequence[Message], grid: ClientGrid) -> dict[str, float]:
    """Epsilon of everything that clients have released, where they say it."""
    metrics = {
        grid.client_of(reply.metadata.src_node_id): reply.content.metric_records.get("metrics", {})
        for reply in replies
        if reply.has_content()
    }
    return {owner: cast(float, each[EPSILON]) for owner, each in metrics.items() if EPSILON in each}
