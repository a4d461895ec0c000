"""What a run with differential privacy says of itself: the same object and the same sentence in all its outputs."""

from __future__ import annotations

from typing import Any, Literal

SIMULATED = "simulated, not private"
"""Every output of a run whose noise comes from a seed says this: who has the seed can take the noise out again."""
Unit = Literal["record", "client"]
_PROTECTED = {
    "record": "one record of one client's data",
    "client": "one client with all its data",
}


def private_label(label: str, unit: Unit) -> str:
    """The label of a run in tables and figures: ``ffa, client-level DP (simulated, not private)``."""
    return f"{label}, {unit}-level DP ({SIMULATED})"


def privacy_summary(
    unit: Unit,
    epsilon: float | None,
    delta: float,
    noise_multiplier: float,
    clip: float,
    accountant: str,
    *,
    condition: str = "",
) -> dict[str, Any]:
    """The object ``privacy`` of ``summary.json`` and of a plan.

    Args:
        unit: what is protected.
        epsilon: spent over the whole run, of the client that spends most; ``None``: there is no bound (no noise).
        delta: that it holds for.
        noise_multiplier: standard deviation of the noise over the clipping norm.
        clip: the clipping norm; of an adaptive one the first.
        accountant: how ``epsilon`` is computed.
        condition: on which it holds beside the noise being unknown, such as ``and who took part in a round``.
    """
    return {
        "unit": unit,
        "epsilon": epsilon,
        "delta": delta,
        "noise_multiplier": noise_multiplier,
        "clip": clip,
        "accountant": accountant,
        "simulated": True,
        "statement": statement(unit, epsilon, delta, condition),
    }


def statement(unit: Unit, epsilon: float | None, delta: float, condition: str = "") -> str:
    """The guarantee in one sentence, and that a simulation does not give it."""
    if epsilon is None:
        return f"No noise was added, so nothing is guaranteed about {_PROTECTED[unit]} ({SIMULATED})."
    unknown = f"the noise {condition}".strip()
    return (
        f"If nobody knew {unknown}, the models of this run would be (ε = {epsilon:.4g}, δ = {delta:.2g})-"
        f"differentially private for {_PROTECTED[unit]}; here it can be drawn again from the seed: {SIMULATED}."
    )
