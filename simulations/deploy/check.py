"""``fedlora join --check``: what a run would find, need and take at a client, without any network."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from fedlora.client import Worker
from fedlora.config import Config
from fedlora.data.sources import load_rows
from fedlora.deploy.code import code_hash, what_runs
from fedlora.deploy.datasets import client_dataset, own_data
from fedlora.deploy.policy import Policy
from fedlora.errors import FedloraError
from fedlora.federation import Dataset, Federation, task_of
from fedlora.store import ClientStore
from fedlora.tasks import Schema, Task
from fedlora.training import steps_for
from simulations.memory import measured_peak
from simulations.plan import plan_run
from simulations.tables import human_bytes

CLIENT = "this client"
SHOWN = 20
"""Labels that are listed one by one."""


@dataclass(frozen=True)
class Finding:
    """One line of what was found.

    Attributes:
        about: what it is about.
        text: what was found.
        fits: whether the run can be joined with it.
    """

    about: str
    text: str
    fits: bool = True


def check(config: Config, path: str, policy: Policy) -> list[Finding]:
    """Look at the rows in ``path`` as a client of ``config`` would, and try one local step on this machine.

    Labels that do not fit and a policy that forbids are findings. Nothing is sent, and nothing is left behind.

    Raises:
        InputError: the rows cannot be read, are too few, or the run cannot work with them.
    """
    findings = [Finding("code", what_runs()), _verdict(policy, config)]
    own, task = own_data(config, Schema(tuple(config.data.labels or ())), path), task_of(config)
    rows = load_rows(own, task.columns, task.nested)
    labels = _labels(rows, config, task)
    findings += labels
    if not all(finding.fits for finding in labels):
        return findings
    with TemporaryDirectory() as folder:
        everyone = config.cohort.model_copy(update={"size": None})
        engine = config.engine.model_copy(update={"name": "loop", "workers": 0})
        alone = config.model_copy(update={"data": own, "cohort": everyone, "engine": engine, "run_dir": folder})
        dataset = client_dataset(alone, task, CLIENT, own)
        train = len(dataset.index.train[CLIENT])
        findings += [_splits(dataset), _verdict(policy, config, train)]
        one_step = alone.model_copy(update={"client": alone.client.model_copy(update={"local_steps": 1})})
        worker = Worker(Federation(one_step, dataset), ClientStore(Path(folder)), deployed=True)
        findings += [*_texts(worker.federation), *_plan(config, alone, dataset), *_time(worker, alone, train)]
    return findings


def described(findings: Sequence[Finding]) -> str:
    """The findings, a line each."""
    return "\n".join(f"{each.about:<25}{'' if each.fits else 'NO: '}{each.text}" for each in findings)


def _verdict(policy: Policy, config: Config, rows: int | None = None) -> Finding:
    """What the policy says of the configuration alone, or of the client's number of rows."""
    about = "policy, of the settings" if rows is None else "policy, of the rows"
    try:
        if rows is None:
            policy.check_run(config, None, code_hash())
        else:
            policy.check_rows(config, rows)
    except FedloraError as error:
        return Finding(about, f"refuses: {error}", False)
    later = ", if the run's fingerprint is among policy.runs" if rows is None and policy.runs is not None else ""
    return Finding(about, f"allows it{later}")


def _labels(rows: pd.DataFrame, config: Config, task: Task) -> list[Finding]:
    """Rows of each label, and how the labels are those that all clients agree on."""
    if type(task).agreed is Task.agreed or "label" not in rows:
        return [Finding("labels", "this task has none")]
    counts = Counter(_flat(rows["label"]))
    listed = ", ".join(f"{label!r} {count:,}" for label, count in counts.most_common(SHOWN))
    more = f", and {len(counts) - SHOWN} others" if len(counts) > SHOWN else ""
    found = [Finding("labels found", f"{listed}{more}")]
    if config.data.labels is None:
        return [*found, Finding("labels agreed on", "none here: give data.labels as the server has them", False)]
    agreed = config.data.labels
    if unknown := [label for label in counts if label not in agreed]:
        text = f"{', '.join(map(repr, unknown[:SHOWN]))} in the rows, and data.labels = {agreed} has no such label"
        return [*found, Finding("labels agreed on", text, False)]
    missing = [label for label in agreed if label not in counts]
    text = f"no rows of {', '.join(map(repr, missing))}, which others may have" if missing else "the same"
    return [*found, Finding("labels agreed on", text)]


def _flat(labels: Iterable[Any]) -> Iterable[str]:
    for label in labels:
        if isinstance(label, list | tuple | np.ndarray):  # tags of words
            yield from map(str, label)
        else:
            yield str(label)


def _splits(dataset: Dataset) -> Finding:
    counts = {name: len(getattr(dataset.index, name).get(CLIENT, ())) for name in ("train", "validation", "test")}
    return Finding("rows", ", ".join(f"{count:,} {name}" for name, count in counts.items()))


def _texts(federation: Federation) -> list[Finding]:
    """Tokens of a row, and how many rows are cut."""
    rows = federation.rows
    if not rows.ragged:
        return []
    lengths = rows.lengths(np.arange(len(rows)))
    low, middle, high = np.quantile(lengths, [0.05, 0.5, 0.95]).round().astype(int)
    text = f"{middle} tokens a row (5 % have less than {low}, 5 % more than {high}); "
    text += f"{rows.truncated:,} of {len(rows):,} rows are cut at client.max_length = {federation.max_length}"
    return [Finding("texts", text)]


def _plan(config: Config, alone: Config, dataset: Dataset) -> list[Finding]:
    """Bytes and memory, in a cohort of clients with as many rows as this one has."""
    clients = [CLIENT, *(f"another {number}" for number in range(1, config.cohort.size or 1))]
    parts = ("train", "validation", "test")
    everybody = {part: dict.fromkeys(sorted(clients), getattr(dataset.index, part)[CLIENT]) for part in parts}
    federation = Federation(alone, replace(dataset, index=replace(dataset.index, **everybody)))
    plan = plan_run(alone, federation)
    count = len(clients)
    text = f"{human_bytes(plan['message_bytes_per_client_round'])} up and down together in messages, "
    text += (
        f"{human_bytes(plan['transport_bytes_per_client_round'])} with HTTP and TLS, in a round of {count} clients; "
    )
    text += f"setup {human_bytes(plan['setup_bytes_per_client'])}"
    findings = [
        Finding("bytes a round", text),
        Finding("memory", f"{human_bytes(plan['client_memory_bytes'])} for weights and the largest step"),
    ]
    if plan["privacy"] is not None:
        unit, epsilon, delta = (plan["privacy"][name] for name in ("unit", "epsilon", "delta"))
        bound = "no bound, there is no noise" if epsilon is None else f"epsilon {epsilon:.4g} at delta {delta:.2g}"
        findings.append(Finding("privacy", f"of each {unit}: {bound}, over the whole run"))
    return findings


def _time(worker: Worker, config: Config, rows: int) -> list[Finding]:
    """Seconds of a round, from one local step on this machine after another to warm up."""
    worker.trainer.hold(worker.frozen({}))
    seconds = 0.0
    for _ in range(2):
        member = worker.member(worker.start_of(CLIENT), [CLIENT], 1, CLIENT)
        begin = time.perf_counter()
        worker.trainer.train([member])
        seconds = time.perf_counter() - begin
    settings = config.client
    whole = settings.batch_size * settings.grad_accumulation
    steps = steps_for(rows, whole, settings.local_epochs, settings.local_steps)
    return [
        Finding("seconds a round", f"{steps * seconds:.3g}: {steps} local steps of {seconds:.2g} s, as tried just now"),
        Finding("memory, measured", f"{human_bytes(measured_peak())} at most so far, the interpreter included"),
    ]
