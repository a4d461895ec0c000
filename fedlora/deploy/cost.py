"""What a run costs the privacy of one client, as far as that client can see for itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedlora.config import Config
from fedlora.deploy.allowance import Used
from fedlora.errors import InputError, PolicyError
from fedlora.protocol import CLIP, NOISE


@dataclass(frozen=True)
class Cost:
    """An (epsilon, delta) that bounds a whole run; without a bound epsilon is infinite."""

    epsilon: float
    delta: float


UNBOUNDED = Cost(math.inf, 0.0)


def record_cost(config: Config, rows: int, trainings: int) -> Cost:
    """Of ``privacy=record`` after all rounds of the run, or after ``trainings`` if those are more.

    Args:
        config: of the run.
        rows: training rows of the client.
        trainings: that the client has done or is about to do; a repeated one is a new release.

    Raises:
        PolicyError: delta is so large that one whole row could be given away, or no noise is enough.
    """
    from fedlora.privacy.accounting import epsilon_of
    from fedlora.privacy.mechanism import delta_for, mechanism_for

    privacy = config.privacy
    try:
        delta = delta_for(privacy, "", rows)
        round_cost = mechanism_for(privacy, config.client, config.rounds, "", rows, None).cost
    except InputError:  # its text says how many rows there are
        raise PolicyError(
            f"privacy.epsilon = {privacy.epsilon} and privacy.delta = {privacy.delta or 'null'} cannot be kept with "
            "this client's number of rows: use privacy.delta=null, a larger privacy.epsilon or fewer rounds"
        ) from None
    bound = math.inf if privacy.epsilon is None else privacy.epsilon  # which the client's own budget keeps
    if privacy.noise_multiplier is not None:
        bound = min(bound, epsilon_of([round_cost] * max(config.rounds, trainings), delta, privacy.accountant))
    return Cost(bound, delta)


def promised_cost(config: Config, trainings: int) -> Cost:
    """Of ``privacy=client`` if the server adds the noise that it says, after the rounds of the run or ``trainings``.

    Raises:
        PolicyError: delta depends on the number of clients, which this client does not know.
    """
    from fedlora.privacy.client_level import epsilon_of

    privacy = config.privacy
    if privacy.delta is None:
        raise PolicyError("privacy.delta = null depends on who else takes part: a number is needed here")
    bound = math.inf if privacy.epsilon is None else privacy.epsilon
    if privacy.noise_multiplier is not None:
        rounds = max(config.rounds, trainings)
        bound = min(bound, epsilon_of(privacy.noise_multiplier, rounds, privacy.delta, privacy.accountant))
    return Cost(bound, privacy.delta)


def own_cost(config: Config, used: Used, delta: float) -> Cost:
    """Of ``privacy=client`` by the noise that this client has added itself, whatever anybody else does.

    Args:
        config: of the run.
        used: counters of the run, with the releases up to now.
        delta: for which epsilon is computed.
    """
    from fedlora.privacy.accounting import Steps, epsilon_of

    releases = [Steps(float(noise), 1.0, count) for noise, count in used.own_noise.items()]
    return Cost(epsilon_of(releases, delta, config.privacy.accountant), delta)


def own_noise(instructions: Mapping[str, object]) -> float:
    """The noise multiplier that a message tells its client to use before it sends; 0: none."""
    clip, noise = instructions.get(CLIP, 0.0), instructions.get(NOISE, 0.0)
    if not isinstance(clip, float | int) or not isinstance(noise, float | int) or clip <= 0 or noise <= 0:
        return 0.0
    return noise / clip
