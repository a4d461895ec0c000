"""Hugging Face datasets: from the hub, from a local copy of one, or from a folder of ``save_to_disk``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from fedlora.config import DataConfig, nearest
from fedlora.data.files import READERS, UNREADABLE, first_line, required_path
from fedlora.errors import InputError


def hf(data: DataConfig) -> pd.DataFrame:
    """One split of a dataset that ``data.path`` names: a hub id, a local folder or one local file.

    A local folder is read whether ``save_to_disk`` wrote it, or it is a copy of a hub repository (with or without its
    README, whole or the folder of ``data.subset`` only).
    """
    path = required_path(data)
    local = Path(path).expanduser()
    suffix = "jsonl" if local.suffix == ".json" else local.suffix.removeprefix(".")
    if local.is_file() and suffix in READERS:
        return READERS[suffix](data)
    import datasets  # slow to import, and only this source needs it

    try:
        found = _saved(local) or (_copy(local, data.subset) if local.is_dir() else _of_hub(path, data.subset))
    except (*UNREADABLE, IndexError) as error:  # IndexError: load_from_disk of a dataset without rows
        kind = (
            "a Hugging Face dataset, neither a copy of one nor a folder of save_to_disk"
            if local.is_dir()
            else "a local file or folder, or a dataset of the hub that can be reached"
        )
        remedy = "Correct data.path" if local.is_dir() else "Correct data.path, or set it to a local copy"
        raise InputError(f"data.path = {path!r} is not {kind}: {first_line(error)}. {remedy}.") from error
    if isinstance(found, datasets.DatasetDict):
        found = found[_split(data, [str(name) for name in found])]
    table: Any = found.to_pandas()
    return table


def _saved(folder: Path) -> Any:
    """What ``save_to_disk`` wrote, or ``None``."""
    import datasets

    # A copy of a hub repository may have a dataset_info.json too, but no state.json beside it.
    is_dataset = (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    if not is_dataset and not (folder / "dataset_dict.json").is_file():
        return None
    return datasets.load_from_disk(str(folder))


def _copy(folder: Path, subset: str | None) -> Any:
    """A local copy of a hub repository, or of the folder of one of its subsets, or just files of its schema."""
    import datasets

    known = datasets.get_dataset_config_names(str(folder))
    if subset is None or subset in known:
        return _loaded(str(folder), subset)
    if (folder / subset).is_dir():
        return _saved(folder / subset) or _loaded(str(folder / subset), None)
    if known == ["default"]:
        return _loaded(str(folder), None)
    raise ValueError(f"it has no data.subset '{subset}'.{nearest(subset, known)} It has {', '.join(known)}")


def _loaded(folder: str, subset: str | None) -> Any:
    import datasets

    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()  # nothing is downloaded
    try:
        return datasets.load_dataset(folder, subset)
    finally:
        if bars:
            datasets.enable_progress_bars()


def _of_hub(path: str, subset: str | None) -> Any:
    import datasets

    return datasets.load_dataset(path, subset)


def _split(data: DataConfig, names: list[str]) -> str:
    if len(names) == 1 and data.hub_split == "train":
        return names[0]
    if data.hub_split not in names:
        raise InputError(
            f"data.path = {data.path!r} has the splits {', '.join(names)} and none is called "
            f"'{data.hub_split}'. Set data.hub_split to one of them."
        )
    return data.hub_split
