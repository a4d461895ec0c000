"""Everything a run stands on, built once from the configuration: data, clients, task, backbone, adapter.

The same object serves the server and every worker process; a sweep over methods reuses the data and the tokens.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.core.util.hashing import hash_pandas_object
from torch import nn

from fedlora.adapters import Adapter, State, build_adapter
from fedlora.adapters.injection import WeightsNeededError
from fedlora.backbone import Backbone
from fedlora.capability import WHOLE, Capability, assigned, modules_named
from fedlora.config import BackboneConfig, Config, DataConfig, PartitionConfig
from fedlora.data.index import ClientIndex, build_index, groups_of_clients
from fedlora.data.partition import assign_clients
from fedlora.data.sources import OWNERS, load_rows
from fedlora.encoded import EncodedRows, cached
from fedlora.errors import InputError
from fedlora.evaluation import loss_gradients
from fedlora.model import AdaptedModel
from fedlora.personal.model import PersonalModel
from fedlora.personal.private_models import PrivateModels
from fedlora.precision import DTYPES, settled_precision
from fedlora.privacy.checks import check_record_privacy
from fedlora.seeding import numpy_rng
from fedlora.tasks import Schema, Task, base, build_task


@dataclass(frozen=True)
class Dataset:
    """Rows, their owners and the schema that all clients share."""

    rows: pd.DataFrame
    schema: Schema
    index: ClientIndex


def _task(task: str, backbone: str) -> Task:
    return build_task(json.loads(task), Backbone.from_config(BackboneConfig.model_validate_json(backbone)))


@lru_cache(maxsize=2)
def _rows(data: str, task: str, backbone: str) -> tuple[pd.DataFrame, Schema]:
    work, config = _task(task, backbone), DataConfig.model_validate_json(data)
    rows = load_rows(config, work.columns, work.nested)
    return rows, settled_schema(work, rows, config.labels)


def task_of(config: Config) -> Task:
    """The task of a configuration, to read rows with."""
    return build_task(config.task, Backbone.from_config(config.backbone))


def settled_schema(task: Task, rows: pd.DataFrame, labels: Sequence[str] | None) -> Schema:
    """What the clients agree on: ``labels`` where they are given, otherwise what the rows show.

    Raises:
        InputError: the rows cannot serve the task.
    """
    return task.schema(rows) if labels is None else task.agreed(rows, tuple(labels))


@lru_cache(maxsize=16)
def _dataset(data: str, partition: str, task: str, backbone: str, seed: int) -> Dataset:
    rows, schema = _rows(data, task, backbone)
    partition_config = PartitionConfig.model_validate_json(partition)
    clients = assign_clients(rows, partition_config, seed)
    return Dataset(
        rows, schema, build_index(clients, DataConfig.model_validate_json(data).split, partition_config, seed)
    )


@lru_cache(maxsize=2)
def _encoded(data: str, task: str, backbone: str, max_length: int) -> EncodedRows:
    return encoded(_task(task, backbone), *_rows(data, task, backbone), max_length)


def encoded(work: Task, rows: pd.DataFrame, schema: Schema, max_length: int) -> EncodedRows:
    """All rows as arrays, from the cache on disk where they were made before."""
    rows = _without_owners(rows)
    if "image" in rows:
        return work.encode(rows, schema, max_length)
    words = pd.DataFrame(
        {name: values.map(_written) if values.dtype == object else values for name, values in rows.items()}
    )
    content = hash_pandas_object(words, index=False).to_numpy()
    key = [_code_of(work), work.encoding_key, str(max_length), repr(schema), content.tobytes()]
    return cached(key, lambda: work.encode(rows, schema, max_length))


def _without_owners(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.drop(columns=list(OWNERS), errors="ignore")


def _written(value: object) -> str:
    """A cell as text that no other cell has; the text of a large array leaves out its middle."""
    return repr(value.tolist() if isinstance(value, np.ndarray) else value)


def _code_of(task: Task) -> str:
    """A hash of the source of every task and of the module that defines this one."""
    files = {*Path(base.__file__).parent.glob("*.py"), Path(inspect.getfile(type(task)))}
    return hashlib.blake2b(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


class Federation:
    """The resolved run: who the clients are, what they hold, and how a model for them is built."""

    def __init__(self, config: Config, dataset: Dataset | None = None) -> None:
        """Load the data and check the adapter. Weights and tokens are loaded when first asked for.

        Args:
            config: of the run.
            dataset: what one side of a deployment holds, instead of the rows of all clients that ``config`` names.

        Raises:
            InputError: a setting or the data cannot work.
        """
        self.config = config
        self.backbone = Backbone.from_config(config.backbone)
        self.adapter: Adapter = build_adapter(config.adapter)
        self.task = build_task(config.task, self.backbone)
        data, task, backbone = config.data.model_dump_json(), json.dumps(config.task), config.backbone.model_dump_json()
        self._key = data, task, backbone
        self.deployed = dataset is not None
        self.dataset = dataset or _dataset(data, config.partition.model_dump_json(), task, backbone, config.seed)
        self.index, self.schema = self.dataset.index, self.dataset.schema
        self.adapter.clients = self.clients
        self.adapter.groups = groups_of_clients(self.dataset.rows, self.index)
        self._capabilities: dict[str, Capability] = {}
        self._check_cohort()
        self._check_gradients()
        if config.privacy.name == "record":
            check_record_privacy(self)

    def _check_cohort(self) -> None:
        """Refuse to ask more clients in a round than there are."""
        size, spares, there = self.config.cohort.size, self.config.cohort.spares, len(self.clients)
        if size is not None and size > there:
            raise InputError(
                f"cohort.size = {size}, but there are only {there} training clients. "
                f"Use cohort.size <= {there}, or cohort.size=null for all of them."
            )
        if size is not None and size + spares > there:
            raise InputError(
                f"cohort.size + cohort.spares = {size + spares}, but there are only {there} training clients. Use "
                f"cohort.spares <= {there - size}."
            )

    def _check_gradients(self) -> None:
        """Refuse an adapter that starts from gradients where there are none, or none that may be looked at."""
        adapter, config = self.adapter, self.config
        if not (adapter.needs_public_sample or adapter.needs_client_gradients):
            return
        others = "Others need none: adapter.basis=weight or adapter.basis=seeded with adapter=fed_sb, and adapter=lora."
        if config.backbone.quantization != "none":
            raise InputError(
                f"adapter={adapter.label} starts from gradients of the backbone's weights, which quantised ones do not "
                f"have: use backbone.quantization=none. {others}"
            )
        if adapter.needs_client_gradients and config.privacy.name != "none":
            raise InputError(
                f"adapter={adapter.label} sends gradients of the clients' rows as they are, and "
                f"privacy={config.privacy.name} does not cover them: use adapter.basis=gradient, which looks at public "
                f"rows only. {others}"
            )
        if adapter.needs_public_sample and config.data.split.public_rows == 0:  # a deployed client has none of them
            raise InputError(
                f"adapter={adapter.label} starts from gradients of rows that the server may look at: set "
                f"data.split.public_rows (for example 128). {others}"
            )

    @property
    def clients(self) -> tuple[str, ...]:
        """Training clients, sorted by id."""
        return self.index.clients

    @cached_property
    def max_length(self) -> int:
        """Tokens a row: ``client.max_length``, or what the backbone can read if that is less."""
        return min(self.config.client.max_length, self.backbone.max_length() or self.config.client.max_length)

    def capability(self, client: str) -> Capability:
        """What ``client`` is able to train; everything, if it is no training client."""
        if client not in self._positions:
            return WHOLE
        known = self._capabilities.get(client)
        if known is None:
            drawn = {
                name: assigned(choices, self._positions[client], self.config.seed, name, client)
                for name, choices in self.differences.items()
            }
            if "modules" in drawn:
                drawn["modules"] = modules_named(drawn["modules"])
            known = self._capabilities[client] = Capability(**drawn)
        return known

    @cached_property
    def differences(self) -> dict[str, Any]:
        """What of :class:`~fedlora.capability.Capability` differs from client to client, and its choices."""
        choices = {
            "rank": self.adapter.client_ranks,
            "heads": self.adapter.client_heads,
            "modules": self.adapter.config.client_modules,
            "model": self.backbone.client_models,
        }
        return {name: values for name, values in choices.items() if values is not None}

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {client: position for position, client in enumerate(self.clients)}

    @cached_property
    def rows(self) -> EncodedRows:
        """All rows as arrays."""
        if len(self.dataset.rows) == 0:
            return EncodedRows(np.zeros(1, dtype=np.int64))
        if self.deployed:  # no copy of the rows is left on the disk
            return self.task.encode(_without_owners(self.dataset.rows), self.schema, self.max_length)
        return _encoded(*self._key, self.max_length)

    def build_model(self) -> AdaptedModel:
        """Load the backbone, inject the adapter and start it from the seed, without the gradient basis."""
        overrides = self.task.model_overrides(self.schema)
        heads = self.task.head_modules
        dtype = DTYPES[settled_precision(self.config.precision)]
        module = self.backbone.load(self.task.auto_class, self.config.seed, heads=heads, dtype=dtype, **overrides)
        model = self._adapted(module)
        model.initialise(self.config.seed)
        return model

    def build_meta_model(self) -> AdaptedModel:
        """The same model on the meta device: every shape, no weights.

        A few PEFT methods (SHiRA, FRoD, ...) lay out their tensors by looking at the weights: theirs is a real model.
        """
        overrides = self.task.model_overrides(self.schema)
        module = self.backbone.meta(self.task.auto_class, **overrides)
        try:
            return self._adapted(module)
        except WeightsNeededError:
            return self.build_model()

    def _adapted(self, module: nn.Module) -> AdaptedModel:
        if isinstance(module, PrivateModels):
            return PersonalModel(module, self.adapter, self.config.seed)
        return AdaptedModel(module, self.adapter, self.task.head_modules, self.config.seed)

    def initialise_on_server(self, model: AdaptedModel) -> None:
        """Finish what only the server can start: factors that come from gradients of its public sample."""
        if self.adapter.needs_public_sample:
            model.initialise(self.config.seed, self.public_gradients(model))

    def public_gradients(self, model: AdaptedModel) -> State:
        """Summed loss gradients ``{module: [m, n]}`` of the public sample at ``model``; shapes alone on meta."""
        if model.device.type == "meta":
            return {name: torch.empty(size, device="meta") for name, size in model.weight_shapes.items()}
        return loss_gradients(model, self.task, self.rows, self.index.public, self.config.eval.batch_size)

    def bounded(self, rows: np.ndarray, purpose: str) -> np.ndarray:
        """At most ``eval.max_rows`` of ``rows``, the same choice for every method of a seed."""
        limit = self.config.eval.max_rows
        if limit is None or len(rows) <= limit:
            return rows
        chosen = numpy_rng(self.config.seed, "evaluation", purpose).choice(len(rows), size=limit, replace=False)
        return rows[np.sort(chosen)]
