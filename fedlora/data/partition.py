"""Who owns which row: the data's own clients, or clients drawn by a partitioner of flwr-datasets."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fedlora.config import PartitionConfig
from fedlora.errors import InputError
from fedlora.seeding import derive_seed, numpy_rng

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

SETTINGS_USED: dict[str, tuple[str, ...]] = {
    "natural": (),
    "iid": ("clients",),
    "dirichlet": ("clients", "alpha"),
    "pathological": ("clients", "classes_per_client"),
    "shard": ("clients", "shards_per_client"),
    "linear": ("clients",),
    "square": ("clients",),
    "exponential": ("clients",),
}
"""The settings each partition needs; every other one is refused. All of them use ``min_rows``."""

BY_LABEL = ("dirichlet", "pathological", "shard")
"""The partitions that look at labels; the drawn others need none."""

# Beyond this a label is an answer or a number, no class, and flwr-datasets takes hours over it.
MAX_LABELS = 1000

# One DirichletPartitioner gives up after 11 draws, which a sound configuration (100 clients, alpha 0.5, 3 rows at
# least, 12,808 rows) does for one seed in six; ten of them in a row reject what is really out of reach.
DIRICHLET_ATTEMPTS = 10


def assign_clients(rows: pd.DataFrame, partition: PartitionConfig, seed: int) -> NDArray[np.object_]:
    """Return the client id of every row, shape ``[rows]``.

    ``natural`` returns the column ``client``, small clients included (``build_index`` leaves them out). The others
    return ``client-0000``, ``client-0001``, ... and give each client at least ``partition.min_rows`` rows. The same
    rows, settings and seed always give the same clients; no global random state is used.

    Args:
        rows: table ``[rows]`` with the column ``client`` for ``natural``, and ``label`` for those of ``BY_LABEL``.
        partition: the kind of partition and its settings.
        seed: the seed of the run.

    Raises:
        InputError: a setting is missing, unused by this partition or asks for what these rows cannot give.
    """
    _check_settings(partition)
    if partition.name == "natural":
        if "client" not in rows:
            raise InputError(
                "partition=natural needs a client column and the data has none. Set data.client to the column which "
                "says whose row it is, or choose partition=iid with partition.clients."
            )
        return rows["client"].to_numpy(dtype=object)
    labels = _labels(rows, partition) if partition.name in BY_LABEL else np.full(len(rows), "", dtype=object)
    owner = _draw_owners(labels, partition, seed)
    clients = partition.clients or 0
    width = max(4, len(str(clients - 1)))
    return np.array([f"client-{number:0{width}d}" for number in range(clients)], dtype=object)[owner]


def _check_settings(partition: PartitionConfig) -> None:
    used = SETTINGS_USED[partition.name]
    for setting in ("clients", "alpha", "classes_per_client", "shards_per_client"):
        value = getattr(partition, setting)
        if value is None and setting in used:
            raise InputError(f"partition.{setting} is not set and partition={partition.name} needs it.")
        if value is not None and setting not in used:
            users = ", ".join(name for name, settings in SETTINGS_USED.items() if setting in settings)
            raise InputError(
                f"partition.{setting} = {value} has no effect with partition={partition.name}. "
                f"Set it to null or choose a partition which uses it: {users}."
            )


def _labels(rows: pd.DataFrame, partition: PartitionConfig) -> NDArray[np.object_]:
    """The label of every row as text, shape ``[rows]``, once they are known to be classes."""
    chosen = f"partition={partition.name} divides the rows by their labels"
    others = ", ".join(name for name in SETTINGS_USED if name not in BY_LABEL)
    remedy = f"Choose a partition that needs no labels ({others})."
    if "label" not in rows:
        raise InputError(f"{chosen}, and these rows have none (data.label is not used). {remedy}")
    labels = pd.Series(rows["label"])
    if labels.dtype == object and not labels.map(pd.api.types.is_scalar).all():
        raise InputError(f"{chosen}, and these are lists. {remedy}")
    if pd.api.types.is_float_dtype(labels) and (labels % 1 != 0).any():
        raise InputError(f"{chosen}, and these are numbers with a fraction, not classes. {remedy}")
    distinct = labels.nunique()
    if distinct > MAX_LABELS:
        raise InputError(
            f"{chosen}, and data.label has {distinct:,} different values: at most {MAX_LABELS:,} can be classes. "
            f"{remedy}"
        )
    return labels.astype(str).to_numpy(dtype=object)


def _draw_owners(labels: NDArray[np.object_], partition: PartitionConfig, seed: int) -> NDArray[np.int64]:
    """Return the client number of every row, shape ``[rows]``."""
    classes = len(set(labels))
    clients, rows = partition.clients or 0, len(labels)
    if clients > rows:
        raise InputError(f"partition.clients = {clients} is more than the {rows} rows. Set it to {rows} or less.")
    if (partition.classes_per_client or 0) > classes:
        raise InputError(
            f"partition.classes_per_client = {partition.classes_per_client} is more than the {classes} classes of "
            f"the data. Set it to {classes} or less."
        )
    if clients * (partition.shards_per_client or 1) > rows:
        raise InputError(
            f"partition.clients = {clients} times partition.shards_per_client = {partition.shards_per_client} is more "
            f"shards than the {rows} rows. Lower either."
        )
    # Every partitioner hands out rows in their order: without this the clients would follow the order of the source.
    order = numpy_rng(seed, "partition").permutation(rows)
    owner = np.full(rows, -1, dtype=np.int64)
    for client, places in enumerate(_draw_partitions(labels[order], partition, seed)):
        owner[order[places]] = client
    if partition.name == "shard":
        owner = _with_remainder(owner, labels)
    _check_owners(owner, partition)
    return owner


def _draw_partitions(labels: NDArray[np.object_], partition: PartitionConfig, seed: int) -> list[list[int]]:
    """Return the places ``[rows of the client]`` in ``labels`` which each client gets."""
    attempts = DIRICHLET_ATTEMPTS if partition.name == "dirichlet" else 1
    reason: ValueError | None = None
    with _without_side_effects():
        import datasets  # slow to import, and partition=natural does without

        table = datasets.Dataset.from_dict({"place": np.arange(len(labels)), "label": labels.tolist()})
        for attempt in range(attempts):
            partitioner = _partitioner(partition, derive_seed(seed, "partition", attempt))
            partitioner.dataset = table
            try:
                return [partitioner.load_partition(client)[:]["place"] for client in range(partitioner.num_partitions)]
            except ValueError as error:
                reason = error
    remedies = {
        "dirichlet": "Raise partition.alpha, or lower partition.clients or partition.min_rows",
        "pathological": "Lower partition.clients or partition.classes_per_client",
        "shard": "Lower partition.clients or partition.shards_per_client",
    }
    described = ", ".join(f"partition.{name}={getattr(partition, name)}" for name in SETTINGS_USED[partition.name])
    raise InputError(
        f"partition={partition.name} with {described} and partition.min_rows={partition.min_rows} cannot divide "
        f"{len(labels)} rows: some client would not get its rows. "
        f"{remedies.get(partition.name, 'Lower partition.clients')}."
    ) from reason


def _partitioner(partition: PartitionConfig, seed: int) -> Partitioner:
    from flwr_datasets import partitioner as flower

    clients = partition.clients or 0
    builders: dict[str, Callable[[], Partitioner]] = {
        "iid": lambda: flower.IidPartitioner(clients),
        "dirichlet": lambda: flower.DirichletPartitioner(
            clients,
            partition_by="label",
            alpha=partition.alpha or 0.0,
            min_partition_size=partition.min_rows,
            self_balancing=False,
            shuffle=False,
            seed=seed,
        ),
        # "first-deterministic": with as many clients as classes, every class has a client and no row is lost.
        "pathological": lambda: flower.PathologicalPartitioner(
            clients,
            partition_by="label",
            num_classes_per_partition=partition.classes_per_client or 0,
            class_assignment_mode="first-deterministic",
            shuffle=False,
            seed=seed,
        ),
        "shard": lambda: flower.ShardPartitioner(
            clients,
            partition_by="label",
            num_shards_per_partition=partition.shards_per_client,
            shuffle=False,
            seed=seed,
        ),
        "linear": lambda: flower.LinearPartitioner(clients),
        "square": lambda: flower.SquarePartitioner(clients),
        "exponential": lambda: flower.ExponentialPartitioner(clients),
    }
    return builders[partition.name]()


def _with_remainder(owner: NDArray[np.int64], labels: NDArray[np.object_]) -> NDArray[np.int64]:
    """Give each row that fills no whole shard to the client of the row before it in the order of labels.

    These rows are spread over the source, so nearly all go to clients which hold their label, and to no single one.
    """
    order = np.argsort(labels, kind="stable")
    in_order = pd.Series(owner[order]).replace(-1, np.nan).ffill().bfill()
    filled = owner.copy()
    filled[order] = in_order.to_numpy(dtype=np.int64)
    return filled


def _check_owners(owner: NDArray[np.int64], partition: PartitionConfig) -> None:
    unowned = int((owner < 0).sum())
    if unowned:
        raise InputError(
            f"partition={partition.name} leaves {unowned} rows without a client, because "
            f"partition.clients = {partition.clients} clients with partition.classes_per_client = "
            f"{partition.classes_per_client} do not cover every class. Raise either."
        )
    sizes = np.bincount(owner, minlength=partition.clients or 0)
    if sizes.min() < partition.min_rows:
        raise InputError(
            f"partition={partition.name} with partition.clients = {partition.clients} leaves a client with "
            f"{sizes.min()} rows, and partition.min_rows = {partition.min_rows}. Lower either."
        )


@contextmanager
def _without_side_effects() -> Iterator[None]:
    """Silence the partitioners' warnings and undo draws from ``random``, which their imports make."""
    state = random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            random.setstate(state)
