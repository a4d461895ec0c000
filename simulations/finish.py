"""What a finished run leaves: its adapter, its ledger, generated samples, and the summary last of all."""

from __future__ import annotations

import json
import math
from importlib.metadata import version
from typing import Any

from safetensors.torch import load_file, save_file

from fedlora import __version__
from fedlora.adapters import Adapter, State
from fedlora.client import worker_for
from fedlora.config import Config
from fedlora.errors import InputError
from fedlora.export import export_adapter, export_merged
from fedlora.ledger import BOTH_WAYS
from fedlora.model import AdaptedModel
from fedlora.privacy.outlook import record_privacy
from fedlora.privacy.statement import private_label
from fedlora.store import write_atomically
from simulations import checkpoint
from simulations.compose import own_pair
from simulations.memory import measured_peak
from simulations.rounds import FederatedRun
from simulations.run_folder import RunFolder
from simulations.target import cost_of_target

PACKAGES = ("torch", "transformers", "peft", "flwr", "opacus", "ray", "hydra-core")
EVALUATED = ("round", "metrics", "clients", "unseen_clients", "personalised_clients")


def finish(run: FederatedRun, seconds: float, merged: bool) -> dict[str, Any]:
    """Write what a finished run leaves: adapter, ledger, and the summary last."""
    folder, config = run.folder, run.config
    head, affinity = run.worker.model.head, run.worker.model.affinity
    rounds = folder.read_rounds()
    last = rounds[-1]
    if run.ours is None or run.ours.evaluation == "global":
        correction = run.ours.base_correction() if run.ours is not None else {}
        run.evaluator.load(run.state, run.ours)
        head_state = run.worker.model.read(head)
        adapter_state = {key: value for key, value in run.state.items() if key not in head}
        frozen = {**run.frozen, **run.worker.model.read(run.worker.model.own)}
        export_adapter(run.federation, folder.adapter, adapter_state, frozen, correction, head_state)
        for name, tensors in run.ours.keepsakes().items() if run.ours is not None else ():
            save_file(tensors, folder.adapter / f"{name}.safetensors")
        if merged:
            export_merged(run.federation, folder.merged, adapter_state, frozen, correction, head_state)
    elif run.ours.evaluation == "personal" and run.ours.communicates:
        shared = {key: value.clone() for key, value in run.state.items()}
        save_file(shared, folder.path / "shared.safetensors")
    run.ledger.write(folder.ledger_file, names=not config.privacy.secret_cohort)
    privacy = _privacy(run)
    if privacy is not None:
        _mark(folder, privacy["statement"])
    errors = [r["aggregation_error"] for r in rounds if r["aggregation_error"] is not None]
    trained, target = max(run.rounds, 1), config.eval.target
    totals = run.ledger.totals()
    summary: dict[str, Any] = {
        "method": config.method,
        "label": label(config, run.federation.adapter, run.ours is None or run.ours.trains, run.federation.deployed),
        "seed": config.seed,
        "rounds": run.rounds,
        "main_metric": run.federation.task.main_metric,
        "adapter": {"affine": affinity.affine, "deviation": affinity.error},
        "start": {key: rounds[0][key] for key in EVALUATED},
        "final": {key: last[key] for key in EVALUATED},
        "best": run.best,
        "totals": totals,
        "per_round": {key: totals[key] / trained for key in BOTH_WAYS},
        "communicates": run.ours is None or run.ours.communicates,
        "privacy": privacy,
        "aggregation_error": {"max": max(errors), "last": errors[-1]} if errors else None,
        "target": None if target is None else cost_of_target(rounds, run.federation.task.main_metric, target),
        "samples": _samples(run),
        "memory": {"peak_bytes": measured_peak()},
        "failures": sum(len(record["failures"]) for record in rounds),
        "seconds": {**_phases(rounds), "total": round(seconds, 3)},
        "clients": {
            "population": len(run.federation.clients),
            "unseen": len(run.federation.index.unseen),
            "evaluated": len(run.evaluator.panel),
            "left_out": run.federation.index.left_out_clients,
        },
        "versions": {"fedlora": __version__, **{name: version(name) for name in PACKAGES}},
    }
    run.folder.store.collect()
    write_atomically(folder.summary_file, json.dumps(summary, indent=2, allow_nan=False) + "\n")
    checkpoint.remove(folder.checkpoint)
    return summary


def _privacy(run: FederatedRun) -> dict[str, Any] | None:
    """What a private run has spent, and on what."""
    if run.config.privacy.name == "record":
        return record_privacy(run.federation, max(run.epsilons.values(), default=0.0))
    return None if run.client_level is None else run.client_level.summary()


def _mark(folder: RunFolder, statement: str) -> None:
    """Put the statement of a private run beside every model that may be carried away."""
    for model in (folder.adapter, folder.merged):
        if model.exists():
            write_atomically(model / "PRIVACY.txt", f"{statement}\n")


def _samples(run: FederatedRun) -> list[dict[str, str]]:
    """Generated answers to the first test rows: the untouched backbone's (``before``) and the final model's."""
    task, rows = run.federation.task, run.evaluator.test[: run.config.eval.samples]
    if len(rows) == 0 or (run.ours is not None and run.ours.evaluation != "global"):
        return []

    def written() -> list[dict[str, str]]:
        found = [task.sample(run.worker.model.module, run.federation.rows, int(row)) for row in rows]
        return [sample for sample in found if sample is not None]

    run.worker.reset()
    before = written()
    run.evaluator.load(run.state, run.ours)
    return [{**after, "before": base["answer"]} for base, after in zip(before, written(), strict=True)]


def label(config: Config, adapter: Adapter, trains: bool, deployed: bool = False) -> str:
    """The method with every choice that changes its numbers, as tables print it: ``fed_sb[gradient]``.

    Any other pair than the method's own names itself: ``FedMedian(lora)``, ``Average(peft[Miss])``. A private run says
    that it is simulated.
    """
    target = str(config.strategy["_target_"])
    if (config.adapter["name"], target) != own_pair(config.method):
        name = f"{target.replace(':', '.').rpartition('.')[2]}({adapter.label})"
    else:
        choice = adapter.label.removeprefix(adapter.config.name) if trains else ""
        name = config.method + choice.replace(f"[{config.method}]", "")
    return name if config.privacy.name == "none" else private_label(name, config.privacy.name, deployed)


def _phases(rounds: list[dict[str, Any]]) -> dict[str, float]:
    phases = rounds[0]["seconds"]
    return {phase: round(math.fsum(record["seconds"][phase] for record in rounds), 3) for phase in phases}


def merge_finished(config: Config, folder: RunFolder) -> None:
    """Write the merged model of a finished run.

    Raises:
        InputError: the method leaves no single model.
    """
    worker = worker_for(config.model_dump_json(), str(folder.path))
    native = folder.adapter / "fedlora_state.safetensors"
    if not native.exists():
        raise InputError(f"{folder.path}: method {config.method} leaves no single model that could be merged.")
    tensors, head = load_file(native), saved_head(worker.model, folder)
    path = folder.adapter / "base_correction.safetensors"
    correction = load_file(path) if path.exists() else {}
    export_merged(worker.federation, folder.merged, tensors, {}, correction, head)
    privacy = (folder.read_summary() or {}).get("privacy")
    if privacy is not None:
        _mark(folder, privacy["statement"])


def saved_head(model: AdaptedModel, folder: RunFolder) -> State:
    """The task head in the adapter folder of a finished run."""
    prefix = "base_model.model."
    saved = load_file(folder.adapter / "adapter_model.safetensors")
    return {key.removeprefix(prefix): value for key, value in saved.items() if key.removeprefix(prefix) in model.head}
