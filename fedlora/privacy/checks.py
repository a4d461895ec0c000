"""What differential privacy of records cannot protect is refused before a run starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedlora.errors import InputError
from fedlora.privacy.mechanism import delta_for
from fedlora.tasks import Task

if TYPE_CHECKING:
    from fedlora.federation import Federation


def check_record_privacy(federation: Federation) -> None:
    """Refuse settings whose releases ``privacy=record`` would not cover.

    Raises:
        InputError: naming the setting and what to use instead.
    """
    config, adapter = federation.config, federation.adapter
    client, rows = max(federation.index.train.items(), key=lambda item: len(item[1]))
    if len(rows):  # otherwise each client of a deployment sees to its own
        delta_for(config.privacy, client, len(rows))
    phases = adapter.phases()
    if len(phases) > 1 or any(phase.loss is not None for phase in phases):
        raise InputError(
            f"privacy=record protects what a client trains by one loss of each record; adapter={adapter.label} trains "
            "in parts, or by a loss of its own, and what it keeps without noise would show in what it sends. Use "
            "another method, such as method=ffa, or privacy=none."
        )
    if adapter.client_ranks is not None:
        raise InputError(
            "privacy=record adds noise to every number of an adapter, also to those that a client of smaller rank must "
            "keep at zero. Use adapter.client_ranks=null."
        )
    if type(federation.task).row_losses is Task.row_losses:
        raise InputError(
            f"privacy=record needs the loss of each record, and task {type(federation.task).__name__} gives only that "
            "of a batch: write row_losses instead of loss."
        )
