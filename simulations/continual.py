"""``fedlora forget`` where clients have no blocks of their own: suppress what one of them taught, request by request.

Each request leaves ``forgotten/<number>/`` in the run folder: its adapter, its score and a record of what it did. See
:mod:`fedlora.suppression` for the mathematics, and for what it is not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from fedlora.client import Worker
from fedlora.config import nearest
from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.seeding import numpy_rng
from fedlora.store import write_atomically
from fedlora.suppression import Request, Score, capacity, rows_of, suppressed
from simulations.finish import saved_head
from simulations.run_folder import RunFolder
from strategies.base import FederatedStrategy
from strategies.build import build_strategy

KIND = "suppression"
FOLDER = "forgotten"
INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
EPOCHS, LEARNING_RATE, BATCH = 20, 1e-2, 16


class SuppressedModel:
    """The global model of a finished run with the adapters of all its removal requests.

    Attributes:
        requests: in order.
    """

    def __init__(self, run_dir: Path) -> None:
        """Load the run, and what was requested so far.

        Raises:
            InputError: the run is unfinished, leaves no single model, or its task has no classes.
        """
        self.folder = RunFolder(run_dir)
        config = self.folder.read_config()
        if self.folder.read_summary() is None:
            raise InputError(f"{run_dir} is an unfinished run: finish it with 'fedlora resume {run_dir}' first.")
        self.worker = Worker(Federation(config), self.folder.store)
        self.federation, self.model = self.worker.federation, self.worker.model
        _check(self.worker, build_strategy(config.strategy, self.model), self.folder)
        self._features: dict[int, Tensor] = {}
        self.requests: list[Request] = []
        while (place := self.place(len(self.requests))).exists():
            self.requests.append(_read(place))
        self._loaded = False

    def place(self, number: int) -> Path:
        """The folder of a request."""
        return self.folder.path / FOLDER / str(number)

    def features(self, rows: np.ndarray) -> Tensor:
        """Mean of the last hidden states of the untrained model over the tokens of each row, ``[rows, width]``."""
        unknown = [row for row in rows.tolist() if row not in self._features]
        if unknown:
            self.worker.reset()
            self._loaded = False
        for batch in _batches(np.array(unknown, dtype=np.int64)):
            inputs = self._inputs(batch)
            with torch.no_grad():
                hidden = self.model.module(**inputs, output_hidden_states=True).hidden_states[-1].float()
            mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2], device=hidden.device)).float()[..., None]
            means = (hidden * mask).sum(1) / mask.sum(1)
            self._features |= dict(zip(batch.tolist(), means.cpu(), strict=True))
        return torch.stack([self._features[row] for row in rows.tolist()])

    def scores(self, rows: np.ndarray, requests: Sequence[Request] | None = None) -> Tensor:
        """s_t of every row and request, ``[rows, requests]``."""
        chosen = self.requests if requests is None else requests
        features = self.features(rows)
        columns = [request.score.of(features) for request in chosen]
        return torch.stack(columns, 1) if columns else torch.zeros(len(rows), 0)

    def logits(self, rows: np.ndarray, requests: Sequence[Request] | None = None) -> Tensor:
        """``[rows, classes]`` with all requests, or with ``requests``, active."""
        chosen = self.requests if requests is None else requests
        scores = self.scores(rows, chosen)
        self._load()
        with torch.no_grad():
            return torch.cat([self._logits(rows[at], chosen, scores[at]) for at in _batches(np.arange(len(rows)))])

    def train(self, rows: np.ndarray, request: Request, rng: np.random.Generator) -> None:
        """Train B of ``request`` on ``rows`` towards equally likely classes, with earlier requests active."""
        chosen = [*self.requests, request]
        scores = torch.cat([self.scores(rows, self.requests), torch.ones(len(rows), 1)], 1)
        self._load()
        factors = [factor.requires_grad_(True) for factor in request.factors.values()]
        optimizer = torch.optim.Adam(factors, lr=LEARNING_RATE)
        for _ in range(EPOCHS):
            for places in _batches(rng.permutation(len(rows))):
                logits = self._logits(rows[places], chosen, scores[places])
                loss = -functional.log_softmax(logits, 1).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for factor in factors:
            factor.requires_grad_(False)

    def _logits(self, rows: np.ndarray, requests: Sequence[Request], scores: Tensor) -> Tensor:
        with suppressed(self.model.layers, requests, scores):  # pyright: ignore
            return self.model.module(**self._inputs(rows)).logits.float()

    def _inputs(self, rows: np.ndarray) -> dict[str, Tensor]:
        batch = self.model.to_device(self.federation.task.collate(self.federation.rows, rows))
        return {key: value for key, value in batch.items() if key in INPUTS}

    def _load(self) -> None:
        """Put the trained global model into the worker, if it is not there."""
        if self._loaded:
            return
        path = self.folder.adapter / "base_correction.safetensors"
        self.worker.reset()
        self.model.load(load_file(self.folder.adapter / "fedlora_state.safetensors"))
        self.model.load(saved_head(self.model, self.folder))
        self.model.set_base_correction(load_file(path) if path.exists() else {})
        self._loaded = True


def suppress(run_dir: Path, client: str) -> dict[str, Any]:
    """Train one more adapter that suppresses what the model of a finished run says on rows like those of ``client``.

    It looks at the client's training rows, and at the server's public rows as the background of the score (at the
    other clients' training rows where there are none). ``forgotten/<number>/`` is written whole or not at all.

    Returns:
        What was done: ``kind``, ``client``, ``number``, ``background``, ``groups`` with accuracy, confidence (mean
        largest probability) and mean score of the client's training and test rows and the other clients' test rows,
        ``before`` and ``after``, ``text`` in sentences.

    Raises:
        InputError: the run or the client is not there, was forgotten before, or no rows are left in a layer.
    """
    model = SuppressedModel(run_dir)
    index, number, seed = model.federation.index, len(model.requests), model.federation.config.seed
    _check_client(model, client)
    if number >= (room := capacity(model.model.layers)):
        raise InputError(f"{run_dir}: {number} requests have rows of their own, and the layers have room for {room}.")
    own = index.train[client]
    others = [rows for name, rows in index.train.items() if name != client]
    if not (len(index.public) or others):
        raise InputError(f"{run_dir}: '{client}' is the only client, and there are no public rows to compare with.")
    background = index.public if len(index.public) else np.concatenate(others)
    score = Score.fit(model.features(own), model.features(background))
    layers: dict[str, Any] = dict(model.model.layers)
    rows = rows_of(layers, number, seed)
    factors = {name: torch.zeros(int(layer.out_features), len(rows[name])) for name, layer in layers.items()}
    request = Request(rows, factors, score)
    other_tests = [rows for name, rows in index.test.items() if name != client and len(rows)]
    groups = {
        "training rows": own,
        "test rows": index.test[client],
        "others' test rows": model.federation.bounded(np.concatenate(other_tests), "test") if other_tests else own[:0],
    }
    groups = {name: chosen for name, chosen in groups.items() if len(chosen)}
    before = {name: _judged(model, chosen, model.requests) for name, chosen in groups.items()}
    model.train(own, request, numpy_rng(seed, "suppression", client))
    after = {name: _judged(model, chosen, [*model.requests, request]) for name, chosen in groups.items()}
    record: dict[str, Any] = {
        "kind": KIND,
        "client": client,
        "number": number,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "background": "public rows" if len(index.public) else "training rows of the other clients",
        "groups": {
            name: {
                "rows": len(chosen),
                "score": float(score.of(model.features(chosen)).mean()),
                "before": before[name],
                "after": after[name],
            }
            for name, chosen in groups.items()
        },
    }
    record["text"] = _text(record)
    _write(model.place(number), request, record)
    return record


def _check(worker: Worker, strategy: Any, folder: RunFolder) -> None:
    """Refuse runs without one model whose classes can be made equally likely."""
    task, config = worker.federation.task, worker.federation.config
    ours = isinstance(strategy, FederatedStrategy)
    if (ours and (strategy.evaluation != "global" or not strategy.trains)) or any(
        key in worker.model.head for key in worker.model.private
    ):
        raise InputError(
            f"{folder.path}: method {config.method} leaves no single model, so there is none to forget a client in: "
            "delete what that client keeps."
        )
    if not (worker.federation.schema.labels and hasattr(task, "logits")):
        raise InputError(
            f"{folder.path}: task={task.name} has no classes to be made equally likely. There, only a run of "
            "method=disjoint can forget a client."
        )


def _check_client(model: SuppressedModel, client: str) -> None:
    clients = model.federation.clients
    known = [json.loads((model.place(t) / "record.json").read_text()) for t in range(len(model.requests))]
    if at := next((record["at"] for record in known if record["client"] == client), None):
        raise InputError(f"{model.folder.path}: client '{client}' was forgotten at {at}.")
    if client not in clients:
        raise InputError(f"{model.folder.path}: there is no training client '{client}'.{nearest(client, clients)}")
    heard = set(pd.read_parquet(model.folder.ledger_file)["client"])  # empty where nothing is sent: method=central
    if heard and client not in heard:
        raise InputError(
            f"{model.folder.path}: client '{client}' trained in no round of this run, so there is nothing to forget."
        )


def _judged(model: SuppressedModel, rows: np.ndarray, requests: Sequence[Request]) -> dict[str, float]:
    probabilities = model.logits(rows, requests).softmax(1)
    confidence, said = probabilities.max(1)
    target = torch.as_tensor(model.federation.rows.fixed["target"][rows])
    return {"accuracy": float((said.cpu() == target).float().mean()), "confidence": float(confidence.mean())}


def _batches(rows: np.ndarray) -> list[np.ndarray]:
    return np.split(rows, range(BATCH, len(rows), BATCH)) if len(rows) else []


def _read(place: Path) -> Request:
    tensors = load_file(place / "adapter.safetensors")
    rows = {key.removesuffix(".A"): value for key, value in tensors.items() if key.endswith(".A")}
    factors = {key.removesuffix(".B"): value for key, value in tensors.items() if key.endswith(".B")}
    return Request(rows, factors, Score(tensors["score.weight"], float(tensors["score.bias"])))


def _write(place: Path, request: Request, record: Mapping[str, Any]) -> None:
    temporary = place.with_name(f".{place.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {f"{name}.A": a.contiguous() for name, a in request.rows.items()}
    tensors |= {f"{name}.B": b.detach().contiguous() for name, b in request.factors.items()}
    tensors |= {"score.weight": request.score.weight, "score.bias": torch.tensor(request.score.bias)}
    save_file(tensors, temporary / "adapter.safetensors")
    write_atomically(temporary / "record.json", json.dumps(record, indent=2, allow_nan=False) + "\n")
    temporary.rename(place)


def _text(record: Mapping[str, Any]) -> str:
    """What was done, in sentences."""
    told = "; ".join(
        f"{name}: accuracy {group['before']['accuracy']:.3f} -> {group['after']['accuracy']:.3f}, confidence "
        f"{group['before']['confidence']:.3f} -> {group['after']['confidence']:.3f}, mean score {group['score']:.2f}"
        for name, group in record["groups"].items()
    )
    return (
        f"suppression of '{record['client']}' (request {record['number']}): {told}. This is not unlearning: what the "
        "client taught is still in the numbers of the model, and whoever leaves the adapters in 'forgotten' out has it "
        "as it was. A run of method=disjoint with strategy.isolation=strict and adapter.head=frozen can be unlearned "
        "exactly."
    )
