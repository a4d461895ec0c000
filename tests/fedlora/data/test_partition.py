"""Every partition gives each row to one client, the same every time, and refuses what it cannot do."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import yaml

from fedlora.config import DataConfig, PartitionConfig
from fedlora.data.partition import BY_LABEL, SETTINGS_USED, assign_clients
from fedlora.data.sources import load_rows
from fedlora.errors import InputError

CONF = Path(__file__).parents[3] / "conf" / "partition"
DRAWN: dict[str, dict[str, Any]] = {
    "iid": {"clients": 12},
    "dirichlet": {"clients": 12, "alpha": 0.5},
    "pathological": {"clients": 12, "classes_per_client": 2},
    "shard": {"clients": 12, "shards_per_client": 2},
    "linear": {"clients": 12},
    "square": {"clients": 8},
    "exponential": {"clients": 5},
}


@pytest.fixture(scope="module")
def reviews() -> pd.DataFrame:
    return load_rows(DataConfig(name="rotten_tomatoes", client="client"))


def sorted_rows(rows: int = 1003, classes: int = 4) -> pd.DataFrame:
    return pd.DataFrame({"label": np.sort(np.arange(rows) % classes)})


def settings(name: str, **changes: Any) -> PartitionConfig:
    return PartitionConfig.model_validate({"name": name, **DRAWN.get(name, {}), **changes})


def assign(name: str, rows: pd.DataFrame | None = None, seed: int = 0, **changes: Any) -> np.ndarray:
    return assign_clients(sorted_rows() if rows is None else rows, settings(name, **changes), seed)


def sizes(clients: np.ndarray) -> list[int]:
    return np.unique(clients, return_counts=True)[1].tolist()


def labels_of(clients: np.ndarray, rows: pd.DataFrame) -> list[np.ndarray]:
    labels = rows["label"].to_numpy()
    return [labels[clients == client] for client in np.unique(clients)]


def test_every_partition_of_the_schema_declares_its_settings_and_has_a_file() -> None:
    names = set(get_args(PartitionConfig.model_fields["name"].annotation))
    assert set(SETTINGS_USED) == names == {file.stem for file in CONF.glob("*.yaml")}


@pytest.mark.parametrize("name", list(SETTINGS_USED))
def test_the_file_of_every_partition_works_on_the_packaged_data(name: str, reviews: pd.DataFrame) -> None:
    partition = PartitionConfig.model_validate(yaml.safe_load((CONF / f"{name}.yaml").read_text()))
    clients = assign_clients(reviews, partition, seed=0)
    assert len(clients) == len(reviews)
    assert len(set(clients)) == (partition.clients or 508)


def test_natural_clients_are_the_client_column(reviews: pd.DataFrame) -> None:
    assert assign("natural", reviews).tolist() == reviews["client"].tolist()


@pytest.mark.parametrize("name", DRAWN)
def test_every_row_has_a_client_and_every_client_its_rows(name: str) -> None:
    clients = assign(name)
    assert clients.shape == (1003,)
    assert set(clients) == {f"client-{number:04d}" for number in range(DRAWN[name]["clients"])}
    assert min(sizes(clients)) >= 3


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_seed_gives_the_same_clients_and_another_seed_others(name: str) -> None:
    assert assign(name, seed=1).tolist() == assign(name, seed=1).tolist()
    assert assign(name, seed=1).tolist() != assign(name, seed=2).tolist()


@pytest.mark.parametrize("name", DRAWN)
def test_global_random_state_is_neither_used_nor_changed(name: str) -> None:
    random.seed(5)
    np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist()  # pyright: ignore
    first = assign(name)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # pyright: ignore
    random.seed(6)
    np.random.seed(6)
    assert assign(name).tolist() == first.tolist()


def test_the_first_use_in_a_process_is_silent_and_leaves_random_alone() -> None:
    code = (
        "import random, pandas as pd\n"
        "from fedlora.config import PartitionConfig\n"
        "from fedlora.data.partition import assign_clients\n"
        "before = random.getstate()\n"
        "rows = pd.DataFrame({'label': ['a', 'b'] * 20})\n"
        "assign_clients(rows, PartitionConfig(name='shard', clients=4, shards_per_client=2), 0)\n"
        "assert random.getstate() == before\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_iid_clients_have_the_label_mix_of_the_whole() -> None:
    rows = sorted_rows(20_000, 2)
    for labels in labels_of(assign("iid", rows, clients=20), rows):
        assert 0.44 < labels.mean() < 0.56


def test_dirichlet_clients_differ_less_as_alpha_grows() -> None:
    rows = sorted_rows(8000, 2)
    spread = []
    for alpha in (0.3, 3.0, 300.0):
        clients = assign("dirichlet", rows, alpha=alpha)
        spread.append(np.std([labels.mean() for labels in labels_of(clients, rows)]))
    assert spread[0] > spread[1] > spread[2]


@pytest.mark.parametrize("seed", range(5))
def test_default_dirichlet_settings_work_for_every_seed(seed: int, reviews: pd.DataFrame) -> None:
    assert min(sizes(assign("dirichlet", reviews, seed=seed, clients=100))) >= 3


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_pathological_clients_have_the_asked_number_of_classes(classes: int) -> None:
    clients = assign("pathological", classes_per_client=classes)
    assert {len(set(labels)) for labels in labels_of(clients, sorted_rows())} == {classes}


def test_shard_remainders_go_to_clients_which_hold_that_label() -> None:
    rows = pd.DataFrame({"label": [0] * 100 + [1] * 107})
    clients = assign("shard", rows, clients=4, shards_per_client=2)
    assert min(sizes(clients)) >= 50
    assert max(sizes(clients)) < 57
    for labels in labels_of(clients, rows):
        assert (labels == 0).sum() % 25 == 0
        assert (labels == 1).sum() == 0 or (labels == 1).sum() >= 25


def test_shards_hold_few_classes() -> None:
    rows = sorted_rows(1000, 10)
    assert max(len(set(labels)) for labels in labels_of(assign("shard", rows, clients=20), rows)) <= 4


def test_sizes_grow_as_the_partition_says() -> None:
    assert sizes(assign("linear", sorted_rows(60), clients=4, min_rows=1)) == [6, 12, 18, 24]
    assert sizes(assign("square", sorted_rows(60), clients=4, min_rows=1)) == [2, 8, 18, 32]
    exponential = sizes(assign("exponential", sorted_rows(8000), clients=4))
    assert exponential[3] / exponential[2] == pytest.approx(np.e, rel=0.01)


def test_labels_may_be_of_any_plain_type() -> None:
    codes = np.arange(100) % 3
    as_words = assign("dirichlet", pd.DataFrame({"label": np.array(["0", "1", "2"])[codes]}), clients=4)
    assert assign("dirichlet", pd.DataFrame({"label": codes}), clients=4).tolist() == as_words.tolist()


def test_client_ids_are_wide_enough_to_sort_by_number() -> None:
    clients = np.unique(assign("square", sorted_rows(60), clients=2, min_rows=1))
    assert clients.tolist() == ["client-0000", "client-0001"]


def test_natural_without_a_client_column_is_explained() -> None:
    with pytest.raises(InputError, match=r"data\.client .* partition=iid"):
        assign("natural")


@pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name, used in SETTINGS_USED.items() for setting in used]
)
def test_a_setting_the_partition_needs_is_asked_for(name: str, setting: str) -> None:
    with pytest.raises(InputError, match=rf"partition\.{setting} is not set"):
        assign(name, None, 0, **{setting: None})


@pytest.mark.parametrize(
    ("name", "setting"),
    [("natural", "clients"), ("iid", "alpha"), ("dirichlet", "classes_per_client"), ("iid", "shards_per_client")],
)
def test_a_setting_the_partition_does_not_use_is_refused(name: str, setting: str) -> None:
    with pytest.raises(InputError, match=rf"partition\.{setting} = 1.* has no effect with partition={name}"):
        assign(name, None, 0, **{setting: 1})


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("iid", {"clients": 2000}, r"partition\.clients = 2000 is more than the 1003 rows"),
        ("iid", {"clients": 400}, r"partition\.min_rows = 3"),
        ("dirichlet", {"alpha": 0.001}, r"Raise partition\.alpha"),
        ("pathological", {"classes_per_client": 5}, r"partition\.classes_per_client = 5 .* 4 classes"),
        ("pathological", {"clients": 2, "classes_per_client": 1}, "rows without a client"),
        ("pathological", {"clients": 900, "classes_per_client": 4}, r"partition\.classes_per_client"),
        ("shard", {"clients": 600}, r"partition\.shards_per_client"),
        ("linear", {"clients": 500}, r"Lower partition\.clients"),
        ("square", {"clients": 500}, r"Lower partition\.clients"),
        ("exponential", {"clients": 30}, r"Lower partition\.clients"),
    ],
)
def test_what_the_rows_cannot_give_is_explained(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assign(name, **changes)


@pytest.mark.parametrize("name", [name for name in DRAWN if name not in BY_LABEL])
def test_partitions_that_do_not_look_at_labels_need_none_and_do_not_depend_on_them(name: str) -> None:
    without = assign(name, pd.DataFrame({"messages": [["hi"]] * 1003}))
    assert without.tolist() == assign(name).tolist()
    assert assign(name, pd.DataFrame({"label": [["a", "b"]] * 1003})).tolist() == without.tolist()


@pytest.mark.parametrize("name", BY_LABEL)
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"messages": ["hi"] * 1003}, r"these rows have none \(data\.label is not used\)"),
        ({"label": [["O", "B"]] * 1003}, "these are lists"),
        ({"label": np.arange(1003) / 4}, "numbers with a fraction"),
        ({"label": [f"answer {n}" for n in range(1003)]}, r"data\.label has 1,003 different values: at most 1,000"),
    ],
    ids=["no labels", "lists", "numbers", "texts"],
)
def test_rows_that_cannot_be_divided_by_label_are_refused_at_once(
    name: str, rows: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"partition={name} divides .*{message}.* needs no labels \(natural, iid"):
        assign(name, pd.DataFrame(rows))


def test_whole_numbers_are_classes_whatever_their_type() -> None:
    assert set(sizes(assign("dirichlet", pd.DataFrame({"label": np.arange(100.0) % 3}), clients=4))) != {0}
