"""Client-level differential privacy (McMahan et al. 2018, arXiv 1710.06963): the mechanism of a round, and its price.

A round releases ``theta + (sum_k clip(theta_k - theta, C) + N(0, (sigma C)^2 I)) / n``: whole updates are clipped to
the norm C, every client counts the same, and n is the cohort size that is expected, not the number of replies. So one
client changes the sum by at most C whether it answers or not, and the released mean by at most C / n: that is the
sensitivity for two runs that differ in whether one client takes part with its data or contributes nothing. (Where one
client is exchanged for another it is twice that; no guarantee is stated for this.)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from fedlora import wire
from fedlora.errors import InputError
from fedlora.privacy.accounting import Accountant, default_delta

CLIP_RATE = 0.2
"""Step of the adaptive clip in the logarithm (Andrew et al. 2021, section 3.2)."""
MOST_NOISE = 2.0**40


def update_of(state: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> Tensor:
    """All tensors of a client's update, one after the other in the order of ``sent``: fp64, ``[numbers]``."""
    return torch.cat([(state[key].double() - sent[key].double()).reshape(-1) for key in sent])


def clipped(update: Tensor, norm: float) -> Tensor:
    """``update`` scaled down to the Euclidean norm ``norm`` if it is longer."""
    length = float(update.norm())
    return update if length <= norm else update * (norm / length)


def moved(sent: Mapping[str, Tensor], update: Tensor) -> dict[str, Tensor]:
    """The tensors of ``sent`` with an update of :func:`update_of` added, in their own number format."""
    changes = wire.views(update, {key: tuple(tensor.shape) for key, tensor in sent.items()})
    return {key: (tensor.double() + changes[key]).to(tensor.dtype) for key, tensor in sent.items()}


def clipped_sum(updates: Iterable[Tensor], norm: float, numbers: int) -> tuple[Tensor, list[bool]]:
    """The sum of clipped updates in fp64, and which of them were short enough to stay as they are."""
    total, inside = torch.zeros(numbers, dtype=torch.float64), []
    for update in updates:
        inside.append(float(update.norm()) <= norm)
        total += clipped(update, norm)
    return total, inside


def split_noise(noise_multiplier: float, clients: int) -> tuple[float, float]:
    """Noise of the update and of the count for an adaptive clip; both together cost what ``noise_multiplier`` does.

    A client moves the count of updates inside the norm by 1/2 when it is taken around 1/2 (Andrew et al. 2021, arXiv
    1905.03871, theorem 1): ``z_update = (z^-2 - (2 s)^-2)^(-1/2)``. The count gets ``s = n / 20`` as there, but not
    less than 2.5 z, so that the update's noise grows by 2 % at most.

    Returns:
        The noise multiplier of the update, and the standard deviation of the count's noise.
    """
    if noise_multiplier == 0:
        return 0.0, 0.0
    count = max(clients / 20, 2.5 * noise_multiplier)
    return (noise_multiplier**-2 - (2 * count) ** -2) ** -0.5, count


def next_clip(norm: float, inside: Iterable[bool], clients: int, quantile: float, noise: float) -> float:
    """The clipping norm of the next round, moved towards the ``quantile`` of the norms of updates.

    Args:
        norm: of this round.
        inside: whether each update was at most that long.
        clients: n, the expected cohort size; a client that is missing counts as one half.
        quantile: the share of updates that should be left as they are.
        noise: the number drawn for the count.
    """
    share = (sum(each - 0.5 for each in inside) + noise) / clients + 0.5
    return norm * math.exp(-CLIP_RATE * (share - quantile))


def settled_delta(delta: float | None, clients: int) -> float:
    """``delta``, or 1 / N^1.1 of N clients.

    Raises:
        InputError: it is not below 1 / N, so that giving away one whole client would do.
    """
    settled = default_delta(clients) if delta is None else delta
    if settled >= 1 / clients:
        raise InputError(
            f"privacy.delta = {settled:g} is not below {1 / clients:g}, one over the {clients} training clients: "
            "publishing all that one client has would satisfy it. Lower it, or use privacy.delta=null."
        )
    return settled


@lru_cache(maxsize=4096)
def epsilon_of(
    noise_multiplier: float, rounds: int, delta: float, accountant: Accountant, rate: float | None = None
) -> float:
    """What ``rounds`` rounds spend: infinite without noise, 0 without a round.

    Args:
        noise_multiplier: standard deviation of the noise over the clipping norm.
        rounds: in which one and the same client takes part; with ``rate`` all rounds.
        delta: for which it holds.
        accountant: Renyi accounting, or the tighter privacy-loss distribution (in closed form without ``rate``: T
            rounds with a noise multiplier of z are one with z / sqrt(T)).
        rate: probability with which each client takes part in a round, independently of the others, when nobody
            learns who did (Poisson sampling); ``None``: it is known who takes part, and nothing is amplified.
    """
    import dp_accounting  # here, because it takes a second and most runs have no use for it

    if rounds == 0:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    if accountant == "prv" and rate is None:
        return float(dp_accounting.get_epsilon_gaussian(noise_multiplier / math.sqrt(rounds), delta))
    kind = {"rdp": dp_accounting.rdp.RdpAccountant, "prv": dp_accounting.pld.PLDAccountant}[accountant]
    spent = kind(neighboring_relation=dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    with _order_left_out():
        spent.compose(event if rate is None else dp_accounting.PoissonSampledDpEvent(rate, event), rounds)
        return float(spent.get_epsilon(delta))


@lru_cache(maxsize=64)
def noise_multiplier_for(
    epsilon: float, rounds: int, delta: float, accountant: Accountant, rate: float | None = None
) -> float:
    """The least noise multiplier, to one in 10,000, with which :func:`epsilon_of` is at most ``epsilon``.

    Raises:
        InputError: no noise is enough.
    """
    if rounds == 0:
        return 0.0

    def spent(noise_multiplier: float) -> float:
        return epsilon_of(noise_multiplier, rounds, delta, accountant, rate)

    enough = 1.0
    while spent(enough) > epsilon:
        enough *= 2
        if enough > MOST_NOISE:
            raise InputError(
                f"privacy.epsilon = {epsilon:g} at privacy.delta = {delta:g} cannot be shown for any noise. Raise one "
                "of them."
            )
    low = enough / 2
    while spent(low) <= epsilon:  # in small steps: privacy-loss distributions are slow where there is little noise
        enough, low = low, 0.8 * low
    while enough - low > 1e-4 * enough:
        middle = (low + enough) / 2
        low, enough = (low, middle) if spent(middle) <= epsilon else (middle, enough)
    return enough


@contextmanager
def _order_left_out() -> Iterator[None]:
    """Without the warnings of the Renyi accountant that it leaves an order out, which makes epsilon no smaller."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.setLevel(level)
