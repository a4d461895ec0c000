"""What a user should know about the data of a run before it starts: told once, in one sentence each."""

from __future__ import annotations

from fedlora.data.index import untrained_labels
from fedlora.federation import Federation
from fedlora.tasks import Task


def notices(federation: Federation) -> list[str]:
    """Sentences about rows that were cut, clients that were left out, and labels that nobody trains on."""
    config, index, rows = federation.config, federation.index, federation.rows
    found = []
    if index.left_out_clients:
        found.append(
            f"Clients left out because they have fewer than partition.min_rows = {config.partition.min_rows} rows: "
            f"{index.left_out_clients}, with {index.left_out_rows} rows together."
        )
    blank = federation.dataset.rows.attrs.get("left_out", 0)
    if blank:
        found.append(f"{blank} rows are left out: a template gives no text for them.")
    if rows.truncated:
        reason = (
            f"client.max_length = {config.client.max_length} tokens"
            if federation.max_length == config.client.max_length
            else f"the {federation.max_length} tokens that the backbone can read"
        )
        found.append(f"{rows.truncated} of {len(rows)} rows are cut to {reason}.")
    if config.eval.samples and type(federation.task).sample is Task.sample:
        found.append(f"eval.samples = {config.eval.samples} has no effect: this task writes no answers.")
    unseen = untrained_labels(federation.dataset.rows, index, federation.schema)
    if unseen:
        found.append(
            f"No training client has a training row with label {', '.join(map(repr, unseen))}: the model cannot learn "
            "what it is asked in evaluation. Bring more rows of it, or choose another seed or partition."
        )
    return found
