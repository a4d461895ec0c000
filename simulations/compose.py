"""Compose a configuration with Hydra, and explain what Hydra refuses in our own words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlora.config import Config, load_config, nearest
from fedlora.errors import InputError
from fedlora.plugins import is_plugin_path

CONF = Path(__file__).resolve().parents[1] / "conf"
OPEN_NODES = ("strategy.", "task.", "adapter.config.", "backbone.settings.", "tracking.settings.")
CHOSEN = ("adapter.", "backbone.", "data.", "partition.")
"""Nodes whose settings depend on the option that is chosen for them."""
HYDRA_ERRORS = (HydraException, OmegaConfBaseException)


def _by_name(name: str, values: Mapping[str, Any]) -> Any:
    """``${by_name:${method},{fedit: 8, ffa: 16}}``: a setting that an experiment gives each method for itself."""
    if name not in values:
        raise InputError(f"the experiment has a value for {', '.join(values)}, and none for {name}. Set one yourself.")
    return values[name]


OmegaConf.register_new_resolver("by_name", _by_name, replace=True)


def prepare_overrides(overrides: Iterable[str]) -> list[str]:
    """Open the nodes that others check: any ``strategy.key=value`` or ``task.key=value`` may be new.

    A ``strategy._target_`` means ``strategy=custom``, and a ``task.name`` by path means ``task=custom``.
    """
    overrides = [_quoted(o) for o in overrides]
    targeted = any(o.startswith("strategy._target_=") for o in overrides)
    chosen = any(o.startswith("strategy=") for o in overrides)
    opened = [f"++{o}" if o.startswith(OPEN_NODES) else o for o in overrides]
    if targeted and not chosen:
        opened = ["strategy=custom", *opened]
    named = any(o.startswith("task.name=") and is_plugin_path(o.partition("=")[2]) for o in overrides)
    return ["task=custom", *opened] if named and not any(o.startswith("task=") for o in overrides) else opened


def in_every_trial(overrides: Iterable[str]) -> list[str]:
    """Overrides of a sweep, so that a setting which only the swept choices have is not refused by the default ones.

    Hydra puts ``adapter.groups=4`` into the configuration of the sweep itself, whose adapter has no groups, even where
    ``method=disjoint,o_lora`` is swept; as the only value of a sweep it is put into every trial.
    """
    read = OverridesParser.create().parse_override
    return [
        f"{o.partition('=')[0]}=choice({o.partition('=')[2]})"
        if o.startswith(CHOSEN) and o.partition("=")[2] and not read(o).is_sweep_override()
        else o
        for o in overrides
    ]


def is_sweep(overrides: Sequence[str]) -> bool:
    """Whether an experiment among ``overrides``, or ``hydra.mode``, asks for a sweep."""
    asking = [o for o in overrides if o.startswith(("experiment=", "hydra.mode="))]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=asking, return_hydra_config=True).hydra.mode is RunMode.MULTIRUN


def _quoted(override: str) -> str:
    """The value of a template such as ``data.text={{ question }}`` in the quotes that Hydra needs."""
    key, _, value = override.partition("=")
    if not ("{{" in value or "{%" in value) or value[:1] in "'\"[":
        return override
    escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
    return f"{key}='{escaped}'"


def compose_config(overrides: Sequence[str]) -> Config:
    """Compose, resolve and check one configuration.

    Raises:
        InputError: an override or a value is not valid.
    """
    try:
        return to_config(_compose(prepare_overrides(overrides)))
    except HYDRA_ERRORS as error:
        raise explain(error) from error


def to_config(composed: DictConfig) -> Config:
    """Check a composed configuration against the typed schema."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise InputError(f"Setting '{missing[0]}' has no default: give {missing[0]}=VALUE.")
    values: Any = OmegaConf.to_container(composed, resolve=True)
    for of_the_sweep in ("hydra", "tuning"):
        values.pop(of_the_sweep, None)
    return load_config(values)


def options(group: str) -> list[str]:
    """The options of a configuration group."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def own_pair(method: str) -> tuple[str, str]:
    """The adapter's name and the strategy's class path that ``conf/method`` gives a method."""
    chosen = choices_of(method)
    adapter = yaml.safe_load((CONF / "adapter" / f"{chosen['adapter']}.yaml").read_text())
    strategy = yaml.safe_load((CONF / "strategy" / f"{chosen['strategy']}.yaml").read_text())
    return adapter["name"], strategy["_target_"]


def choices_of(method: str) -> dict[str, str]:
    """The options ``{"adapter": ..., "strategy": ...}`` that ``conf/method`` chooses for a method."""
    values = yaml.safe_load((CONF / "method" / f"{method}.yaml").read_text())
    return {key.split("/")[-1]: value for entry in values["defaults"] for key, value in entry.items()}


def explain(error: BaseException) -> InputError:
    """Turn an error of Hydra or OmegaConf into one paragraph that names the setting and the nearest valid one."""
    text = str(error.__cause__ or error) if isinstance(error, ConfigCompositionException) else str(error)
    if isinstance(error, MissingConfigException):
        missing = str(error.missing_cfg_file or "")
        group, _, name = missing.rpartition("/")
        if group and (CONF / group).is_dir():
            known = options(group)
            return InputError(f"There is no {group}={name}.{nearest(name, known)} Options: {', '.join(known)}.")
    key = re.search(r"Could not override '([^']+)'", str(error)) or re.search(r"Key '([^']+)' is not in struct", text)
    if key:
        return InputError(_unknown_key(key.group(1)))
    if isinstance(error, OverrideParseException):
        return InputError(f"The override {error.override!r} cannot be read: {text.splitlines()[0]}")
    where = getattr(error, "full_key", None)
    reason = text.strip().splitlines()[0].removeprefix("InputError raised while resolving interpolation: ")
    return InputError(f"The configuration does not compose{f' ({where})' if where else ''}: {reason}")


def _unknown_key(key: str) -> str:
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    valid = list(dict.fromkeys([*_keys(_compose([])), *groups]))
    parent = key.rpartition(".")[0]
    if key in valid:
        return f"Setting '{key}' does not belong to the option of {parent} that you chose; see conf/{parent}/."
    siblings = [name for name in valid if name.rpartition(".")[0] == parent]
    return f"Unknown setting '{key}'.{nearest(key, valid)} Valid keys here: {', '.join(siblings) or ', '.join(groups)}."


def _compose(overrides: Sequence[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name in node:
        key = f"{prefix}{name}"
        yield key
        if OmegaConf.is_dict(node._get_node(name)):  # type: ignore[arg-type]
            yield from _keys(node._get_node(name), f"{key}.")  # type: ignore[arg-type]
