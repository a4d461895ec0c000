"""DP-SGD of one client in one round: who is drawn, what is clipped, how much noise there is."""

from __future__ import annotations

from dataclasses import dataclass

from fedlora.config import ClientConfig, PrivacyConfig
from fedlora.errors import InputError
from fedlora.privacy.accounting import Steps, default_delta, solved_noise
from fedlora.privacy.randomness import Randomness, Seeded, System
from fedlora.training import steps_for


@dataclass(frozen=True)
class Mechanism:
    """The Poisson-subsampled Gaussian mechanism (Abadi et al. 2016, algorithm 1) of a client's round.

    Attributes:
        sample_rate: probability with which a record is in the batch of a step.
        noise_multiplier: standard deviation of the noise over :attr:`clip`.
        clip: norm of a record's gradient over all trained tensors.
        batch: records that a batch is expected to have; the sum of gradients is divided by it.
        steps: steps of the round.
        seed: of the draws in a simulation; ``None``: they come from the operating system.
    """

    sample_rate: float
    noise_multiplier: float
    clip: float
    batch: float
    steps: int
    seed: int | None

    @property
    def cost(self) -> Steps:
        """What the round costs."""
        return Steps(self.noise_multiplier, self.sample_rate, self.steps)

    def randomness(self) -> Randomness:
        """The draws of the round, from the start."""
        return System() if self.seed is None else Seeded(self.seed)


def delta_for(privacy: PrivacyConfig, client: str, records: int) -> float:
    """Delta of a client with ``records`` training rows.

    Raises:
        InputError: it is not below 1 / ``records``.
    """
    if privacy.delta is None:
        return default_delta(records)
    if privacy.delta >= 1 / records:
        raise InputError(
            f"privacy.delta = {privacy.delta:g} is not below 1/{records}, and client '{client}' has {records} training "
            f"rows: one of them could be published outright. Use privacy.delta < {1 / records:.1e}, or "
            "privacy.delta=null for 1/N^1.1."
        )
    return privacy.delta


def mechanism_for(
    privacy: PrivacyConfig, settings: ClientConfig, rounds: int, client: str, records: int, seed: int | None
) -> Mechanism:
    """The mechanism of a client with ``records`` training rows in a run of ``rounds`` rounds.

    Raises:
        InputError: delta is too large, or no noise keeps epsilon.
    """
    assert privacy.clip is not None
    delta = delta_for(privacy, client, records)
    whole = settings.batch_size * settings.grad_accumulation
    rate = min(1.0, whole / records)
    steps = steps_for(records, whole, settings.local_epochs, settings.local_steps)
    noise = privacy.noise_multiplier
    if noise is None:
        assert privacy.epsilon is not None
        total = steps * (privacy.rounds or max(rounds, 1))
        try:
            noise = solved_noise(privacy.epsilon, delta, rate, total, privacy.accountant)
        except ValueError:
            raise InputError(
                f"privacy.epsilon = {privacy.epsilon} cannot be kept by client '{client}': no noise is enough for its "
                f"{total} steps. Raise privacy.epsilon, or lower rounds or client.local_epochs."
            ) from None
    return Mechanism(rate, noise, privacy.clip, rate * records, steps, seed)
