"""What a run with differential privacy says of itself: the same object and the same sentence in all its outputs."""

from __future__ import annotations

from typing import Any, Literal

SIMULATED = "simulated, not private"
"""Every output of a run whose noise comes from a seed says this: who has the seed can take the noise out again."""
DEPLOYED = "noise from the operating systems of those who add it"
"""A run with real clients says this."""
Unit = Literal["record", "client"]
_PROTECTED = {
    "record": "one record of one client's data",
    "client": "one client with all its data",
}


def origin(deployed: bool) -> str:
    """Where the noise of a private run comes from."""
    return DEPLOYED if deployed else SIMULATED


def private_label(label: str, unit: Unit, deployed: bool) -> str:
    """The label of a run in tables and figures: ``ffa, client-level DP (simulated, not private)``."""
    return f"{label}, {unit}-level DP" + ("" if deployed else f" ({SIMULATED})")


def privacy_summary(
    unit: Unit,
    epsilon: float | None,
    delta: float | None,
    noise_multiplier: float | None,
    clip: float,
    accountant: str,
    *,
    condition: str = "",
    deployed: bool = False,
) -> dict[str, Any]:
    """The object ``privacy`` of ``summary.json`` and of a plan.

    Args:
        unit: what is protected.
        epsilon: spent over the whole run, of the client that spends most; ``None``: there is no bound (no noise).
        delta: that it holds for; ``None``: each client has one of its own.
        noise_multiplier: standard deviation of the noise over the clipping norm; ``None``: likewise.
        clip: the clipping norm; of an adaptive one the first.
        accountant: how ``epsilon`` is computed.
        condition: on which it holds beside the noise being unknown, such as ``and who took part in a round``.
        deployed: whether the clients were real ones.
    """
    return {
        "unit": unit,
        "epsilon": epsilon,
        "delta": delta,
        "noise_multiplier": noise_multiplier,
        "clip": clip,
        "accountant": accountant,
        "simulated": not deployed,
        "statement": statement(unit, epsilon, delta, condition, deployed),
    }


def statement(
    unit: Unit, epsilon: float | None, delta: float | None, condition: str = "", deployed: bool = False
) -> str:
    """The guarantee in one sentence, and that a simulation does not give it."""
    if epsilon is None:
        return f"No noise was added, so nothing is guaranteed about {_PROTECTED[unit]} ({origin(deployed)})."
    guarantee = f"(ε = {epsilon:.4g}, δ = {'of each client' if delta is None else f'{delta:.2g}'})"
    if deployed:
        unless = f", for whoever does not know {condition.removeprefix('or ')}" if condition else ""
        return (
            f"The models of this run are {guarantee}-differentially private for {_PROTECTED[unit]}{unless}: {DEPLOYED}."
        )
    unknown = f"the noise {condition}".strip()
    return (
        f"If nobody knew {unknown}, the models of this run would be {guarantee}-differentially private for "
        f"{_PROTECTED[unit]}; here it can be drawn again from the seed: {SIMULATED}."
    )
