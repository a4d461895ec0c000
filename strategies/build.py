"""Build the configured strategy: ours, any Flower strategy, or a user's, by ``strategy._target_``."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from flwr.serverapp.strategy import Strategy

from fedlora.capability import Capability, modules_named
from fedlora.config import nearest
from fedlora.errors import InputError
from fedlora.model import AdaptedModel
from fedlora.plugins import load_object
from strategies.base import FederatedStrategy

# Flower samples nodes itself and waits for more than there are; our Grid shows it exactly the round's cohort.
STOCK_DEFAULTS: dict[str, Any] = {
    "fraction_train": 1.0,
    "fraction_evaluate": 0.0,
    "min_train_nodes": 1,
    "min_evaluate_nodes": 0,
    "min_available_nodes": 1,
}


def build_strategy(settings: Mapping[str, Any], model: AdaptedModel) -> Strategy:
    """Instantiate ``settings["_target_"]`` (import path or ``file.py:Class``) with the other settings as arguments.

    A strategy of fedlora sees ``model`` (real or on the meta device) and may refuse its adapter.

    Raises:
        InputError: no target, no strategy, or a setting that the strategy does not take.
    """
    values = dict(settings)
    target = values.pop("_target_", None)
    if not target:
        raise InputError(
            "strategy._target_ is missing. Give an import path such as flwr.serverapp.strategy.FedAvg, or a file path "
            "such as strategy._target_=./mine.py:Mine."
        )
    strategy_class = load_object(str(target), "strategy._target_")
    if not (isinstance(strategy_class, type) and issubclass(strategy_class, Strategy)):
        raise InputError(
            f"strategy._target_ = '{target}' is no strategy: subclass strategies.FederatedStrategy "
            "(or flwr.serverapp.strategy.Strategy)."
        )
    accepted = _parameters(strategy_class)
    unknown = [key for key in values if key not in accepted]
    if unknown:
        raise InputError(
            f"Unknown setting 'strategy.{unknown[0]}' for {strategy_class.__name__}.{nearest(unknown[0], accepted)} "
            f"It takes: {', '.join(sorted(accepted)) or 'no settings'}."
        )
    if strategy_class.__module__.startswith("flwr."):
        values = {**{key: value for key, value in STOCK_DEFAULTS.items() if key in accepted}, **values}
    try:
        strategy = strategy_class(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"strategy '{target}' refuses its settings: {error}") from error
    ranks = [rank for rank in model.adapter.client_ranks or () if model.layout(rank) != model.layout()]
    if ranks and not getattr(strategy_class, "client_ranks", False):
        raise InputError(
            f"adapter.client_ranks gives clients different ranks, which {strategy_class.__name__} cannot aggregate. "
            "Use strategy=flora (exact) or strategy=flexlora, or adapter.client_ranks=null."
        )
    if model.adapter.client_heads is not None and not getattr(strategy_class, "client_heads", False):
        raise InputError(
            f"adapter.client_heads lets clients train different heads, which {strategy_class.__name__} cannot "
            "aggregate. Use strategy=ravan, or adapter.client_heads=null."
        )
    kept = [key for key in model.private if key not in model.head]
    if kept and model.shared and getattr(strategy_class, "evaluation", "global") == "global":
        raise InputError(
            f"adapter={model.adapter.label} keeps tensors at every client, such as '{kept[0]}', so there is no one "
            f"model that {strategy_class.__name__} could leave behind. Use the strategy that belongs to the adapter "
            "('fedlora methods' lists the pairs), or an adapter that shares all it trains."
        )
    if (model.own or model.adapter.disjoint) and not getattr(strategy_class, "own_subspaces", False):
        raise InputError(
            f"adapter={model.adapter.label} gives every client a subspace of its own, and {strategy_class.__name__} "
            "would mix numbers that belong to different subspaces. Use strategy=disjoint, which sums the clients' "
            "updates (strategy=o_lora for adapter=o_lora), or adapter=orthogonal adapter.subspace=shared."
        )
    if not model.shared and getattr(strategy_class, "communicates", True):
        raise InputError(
            f"Nothing would travel: adapter={model.adapter.label} has nothing in common for clients with other models. "
            "Give all of them the same one, such as backbone.models=[cnn_5], or use method=pfedlora, fedproto or "
            "local_full."
        )
    for selection in model.adapter.config.client_modules or ():
        model.trains(capability=Capability(modules=modules_named(selection)))
    if model.adapter.config.client_modules is not None and not isinstance(strategy, FederatedStrategy):
        raise InputError(
            f"adapter.client_modules gives clients different modules, which {strategy_class.__name__} of Flower cannot "
            "aggregate. Use a strategy of fedlora such as strategy=fedit, or adapter.client_modules=null."
        )
    if isinstance(strategy, FederatedStrategy):
        strategy.prepare(model)
    return strategy


def _parameters(strategy_class: type) -> set[str]:
    """Names that the constructor takes, through ``**kwargs`` up the class hierarchy."""
    names: set[str] = set()
    for cls in strategy_class.__mro__:
        if "__init__" not in vars(cls):
            continue
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return names
