"""Take one client out of a finished run, and say what that amounts to.

Where clients trained in disjoint subspaces, a block can be taken out; elsewhere see :mod:`simulations.continual`.

The server has kept every owner's block of dW = sum_g s B_g A_g (``adapter/blocks.safetensors``). Without one of them
the sum is what the others have taught; their blocks stay as they were, bit by bit. That is exact unlearning, the model
of the same run without this owner, if no other block depends on it: no client's base held it (``isolation=strict``),
and no head was trained together. Otherwise it is the removal of a block, and the reasons are given. Where a group of
clients owns a block, the block goes as a whole: what one client of the group has added to it cannot be told apart.
"""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from fedlora.client import Worker, worker_for
from fedlora.config import Config, nearest
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from fedlora.store import write_atomically
from simulations.continual import suppress
from simulations.evaluator import Evaluator
from simulations.finish import merge_finished, saved_head
from simulations.run_folder import RunFolder, write_tensors_atomically
from strategies.build import build_strategy
from strategies.disjoint import FILE, Disjoint

EXACT, REMOVAL = "exact unlearning", "block removal"


def forget(run_dir: Path, owner: str) -> dict[str, Any]:
    """Remove the block of ``owner``, a client or a group of clients, from the finished run in ``run_dir``.

    Where there are no blocks, what the client has taught is suppressed: :func:`simulations.continual.suppress`.

    Rewrites the global model, the blocks, and the merged model if there is one, deletes what the run folder holds of
    the clients' own state, and adds to ``forgotten.json``. The blocks are written last: a call that was interrupted can
    be made again.

    Returns:
        What was done: ``kind`` (exact unlearning, or block removal), ``reasons`` why it is not exact, ``at`` (UTC),
        ``clients`` that owned the block, its ``share`` of all blocks' squared norms, ``metrics`` of the model that is
        left, ``text`` in sentences.

    Raises:
        InputError: there is no finished run, or nothing of this owner in it.
    """
    folder = RunFolder(run_dir)
    config = folder.read_config()
    if folder.read_summary() is None:
        raise InputError(f"{folder.path} is an unfinished run: finish it with 'fedlora resume {folder.path}' first.")
    if config.privacy.name != "none":
        raise InputError(
            f"{folder.path} was run with privacy={config.privacy.name}, and to forget a client its rows would be used "
            "again, without noise. Repeat the run without this client instead."
        )
    blocks = folder.adapter / f"{FILE}.safetensors"
    if not blocks.exists():
        return suppress(run_dir, owner)
    worker = worker_for(config.model_dump_json(), str(folder.path))
    strategy = build_strategy(config.strategy, worker.model)
    assert isinstance(strategy, Disjoint)  # no other leaves such a file
    strategy.keep_blocks(load_file(blocks))
    record_file = folder.path / "forgotten.json"
    forgotten: dict[str, Any] = json.loads(record_file.read_text()) if record_file.exists() else {}
    if owner not in strategy.blocks:
        raise InputError(_unknown(owner, strategy, folder, forgotten))
    clients = [client for client, its_owner in strategy.owners.items() if its_owner == owner]
    before = strategy.squared_norms()
    strategy.forget(owner)
    reasons = _dependences(strategy, worker.model, config)
    record = {
        "kind": REMOVAL if reasons else EXACT,
        "reasons": reasons,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "clients": clients,
        "share": before[owner] / (sum(before.values()) or 1.0),
        "metrics": _metrics(worker, strategy, folder),
    }
    record["text"] = _text(owner, record)
    merged = folder.merged.exists()
    shutil.rmtree(folder.merged, ignore_errors=True)
    write_tensors_atomically(folder.adapter / "base_correction.safetensors", strategy.total())
    write_atomically(record_file, json.dumps({**forgotten, owner: record}, indent=2, allow_nan=False) + "\n")
    for client in clients:
        folder.store.remove(client)
    write_tensors_atomically(blocks, strategy.keepsakes()[FILE])
    if merged:
        merge_finished(config, folder)
    return record


def _metrics(worker: Worker, strategy: Disjoint, folder: RunFolder) -> dict[str, float]:
    """An evaluation of the model that is left."""
    model = {**worker.initial, **saved_head(worker.model, folder)}
    state = {key: model[key] for key in worker.model.shared}
    return Evaluator(worker, {}).evaluate(strategy, state, worker.federation.config.rounds).metrics


def _unknown(owner: str, strategy: Disjoint, folder: RunFolder, forgotten: dict[str, Any]) -> str:
    grouped = set(strategy.owners.values()) != set(strategy.owners)
    kind, there = "group" if grouped else "client", list(strategy.blocks)
    if owner in forgotten:
        return f"{folder.path}: {kind} '{owner}' was forgotten at {forgotten[owner]['at']}; nothing of it is left."
    if owner in strategy.owners.values():
        return f"{folder.path}: {kind} '{owner}' trained in no round of this run, so there is nothing to forget."
    if owner in strategy.owners:
        group = strategy.owners[owner]
        return (
            f"{folder.path}: client '{owner}' trained in the rows of its group '{group}', whose block is a mean that "
            f"cannot be taken apart. Forget the whole group: 'fedlora forget {group} RUN'; or run again without "
            "adapter.groups, where every client has a block of its own."
        )
    return (
        f"{folder.path}: there is no {kind} '{owner}'.{nearest(owner, there)} {kind.capitalize()}s with a block: "
        f"{_some(there)}."
    )


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:20]) + (", ..." if len(names) > 20 else "")


def _dependences(strategy: Disjoint, model: AdaptedModel, config: Config) -> list[str]:
    """Why what is left may still depend on what was removed."""
    reasons = []
    if strategy.isolation == "open":
        reasons.append(
            "strategy.isolation=open: the others trained on a base that held this block, so their blocks were "
            "learned in its presence, and the bases that they keep still hold it"
        )
    if any(key in model.head for key in model.shared):
        reasons.append(
            f"adapter.head={config.adapter['head']}: the head is a mean that was trained with this block, and it stays"
        )
    return reasons


def _text(owner: str, record: dict[str, Any]) -> str:
    """What was done, in sentences."""
    alone = record["clients"] == [owner]
    clients = "" if alone else f" ({len(record['clients'])} clients: {_some(record['clients'])})"
    gone = f"its block, {record['share']:.1%} of the squared norms of all blocks, is gone"
    done = f"{record['kind']} of '{owner}'{clients}: {gone}"
    if record["reasons"]:
        return (
            f"{done}; this is not exact unlearning, because {'; and '.join(record['reasons'])}. A run with "
            "strategy.isolation=strict and adapter.head=frozen (or private) can be unlearned exactly."
        )
    return (
        f"{done}. No forward pass of the others ever held it (strategy.isolation=strict) and no head was trained "
        f"together, so what is left is the model of the same run without this {'client' if alone else 'group'}. What "
        "people have chosen by looking at results, such as a learning rate, is not undone."
    )
