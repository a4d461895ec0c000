"""The learning rate of every local step, from where the step stands in the run."""

from __future__ import annotations

import math

from fedlora.config import ClientConfig


def learning_rate(settings: ClientConfig, server_round: int, rounds: int, step: int, steps: int) -> float:
    """The learning rate of one local step.

    A schedule moves over the whole run, so that a client that was away returns at the rate of the round, or starts
    again in every round (``*_restarts``). Within its span it rises linearly during ``warmup``, then stays, or falls to
    0 linearly or as half a cosine (Loshchilov and Hutter 2017, eq. 5).

    Args:
        settings: ``lr``, ``schedule`` and ``warmup``.
        server_round: the round, from 1.
        rounds: rounds of the run.
        step: the local step, from 0.
        steps: local steps that this client takes this round.
    """
    inside = (step + 1) / steps  # the end of the step, so that the first of a warm-up is not 0
    if settings.schedule.endswith("_restarts"):
        end, length = inside, 1.0 / steps
    else:
        end, length = (server_round - 1 + inside) / rounds, 1.0 / (rounds * steps)
    if end <= settings.warmup:
        return settings.lr * end / settings.warmup
    shape = settings.schedule.removesuffix("_restarts")
    fallen = max(
        0.0, (end - length - settings.warmup) / (1.0 - settings.warmup)
    )  # the start of the step: not 0 at last
    if shape == "linear":
        return settings.lr * (1.0 - fallen)
    if shape == "cosine":
        return settings.lr * 0.5 * (1.0 + math.cos(math.pi * fallen))
    return settings.lr
