"""The client-level privacy of a run: what it may spend, from who is drawn in which round."""

from __future__ import annotations

from collections import Counter

from flwr.serverapp.strategy import Strategy

from fedlora.errors import InputError
from fedlora.federation import Federation
from fedlora.model import AdaptedModel
from fedlora.privacy.client_level import epsilon_of, noise_multiplier_for, settled_delta
from simulations.sampler import cohort
from strategies.client_level import Budget, ClientLevel, require_client_level


def client_level(federation: Federation, model: AdaptedModel, strategy: Strategy) -> ClientLevel | None:
    """The mechanism of a run with ``privacy=client``, with its noise solved; ``None`` for any other run.

    Raises:
        InputError: the guarantee would not hold, or the budget is not enough.
    """
    config, settings = federation.config, federation.config.privacy
    if settings.name != "client":
        return None
    require_client_level(strategy, model, settings, config.wire.dtype)
    population = len(federation.clients)
    expected = min(config.cohort.size or population, population)
    if settings.secret_cohort and expected == population:
        raise InputError(
            "privacy.secret_cohort=true has nothing to keep secret where all clients train in every round. Set "
            "cohort.size, or privacy.secret_cohort=false."
        )
    delta, accountant = settled_delta(settings.delta, population), settings.accountant
    rate = expected / population if settings.secret_cohort else None
    times = tuple(range(config.rounds + 1)) if settings.secret_cohort else _most_drawn(federation)
    multiplier = settings.noise_multiplier
    if multiplier is None:
        assert settings.epsilon is not None
        multiplier = noise_multiplier_for(settings.epsilon, times[-1], delta, accountant, rate)
    elif settings.epsilon is not None:
        spent = epsilon_of(multiplier, times[-1], delta, accountant, rate)
        if spent > settings.epsilon:
            raise InputError(
                f"privacy.noise_multiplier = {multiplier:g} would spend epsilon = {spent:.4g} in {config.rounds} "
                f"rounds, and privacy.epsilon = {settings.epsilon:g} is all there is. Set "
                "privacy.noise_multiplier=null, and it is solved for that."
            )
    return ClientLevel(
        settings, Budget(multiplier, delta, expected, rate, times), None if federation.deployed else config.seed
    )


def _most_drawn(federation: Federation) -> tuple[int, ...]:
    """How often the client that was drawn most often has been drawn after each round, from round 0."""
    drawn: Counter[str] = Counter()
    times = [0]
    for server_round in range(1, federation.config.rounds + 1):
        drawn.update(cohort(federation.config, federation.clients, server_round))
        times.append(max(drawn.values()))
    return tuple(times)
