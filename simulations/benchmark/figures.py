"""The arithmetic of a benchmark: medians, rates, shares of the machine's peak, ratios, and whether losses agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from simulations.benchmark.variants import VARIANTS, Variant, loop_of, own_central_of, public_of

TOLERANCE = {"fp32": 5e-5, "bf16": 2e-2}
"""How far the mean loss of any round may be from that of the variant whose mathematics it shares."""


def figures(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a table says of each variant of a result of :func:`simulations.benchmark.driver.measure`.

    A variant that failed has ``error`` alone. ``ratios`` are medians over the repeats of the quotient within a repeat;
    ``None`` where the other one was not measured or is the variant itself, or the variant is not federated.
    """
    return [
        _figures(variant, result) if "answers" in found else {"name": variant.name, "error": found["error"]}
        for variant in VARIANTS
        if (found := result["variants"].get(variant.name)) is not None
    ]


def _figures(variant: Variant, result: Mapping[str, Any]) -> dict[str, Any]:
    answers = result["variants"][variant.name]["answers"]
    seconds = _seconds(result, variant.name)
    typical = median(seconds)
    own, public, federated = own_central_of(variant), public_of(variant), variant.kind in ("federated", "flower")
    return {
        "name": variant.name,
        "seconds": {"median": typical, "min": min(seconds), "max": max(seconds)},
        "clients_per_second": result["clients"] / typical,
        "tokens_per_second": result["tokens"] / typical,
        "share_of_peak": {
            precision: share_of_peak(result["flops"], typical, best_peak(result["peaks"], precision))
            for precision in dict.fromkeys(("fp32", variant.precision))
        },
        "peak_memory": max(answer["peak_memory"] for answer in answers[1:]),
        "batch_size": answers[0]["batch_size"],
        "other_load": max(answer["other_load"] for answer in answers[1:]),
        "ratios": {
            "speedup_over_loop": ratio(result, loop_of(variant), variant.name) if federated else None,
            "tax_over_central": _tax(ratio(result, variant.name, "central")),
            "tax_over_own_central": _tax(ratio(result, variant.name, own) if own else None),
            "tax_of_privacy": _tax(ratio(result, variant.name, public) if public else None),
            "speedup_over_flower": ratio(result, "flower", variant.name) if federated else None,
        },
        "loss": _loss(variant, result),
    }


def share_of_peak(flops: float, seconds: float, peak: float) -> float:
    """Nominal FLOPs a second by the machine's peak; above 1 only where work was skipped or cheaper than nominal."""
    return flops / seconds / peak


def best_peak(peaks: Mapping[str, Mapping[str, float]], precision: str) -> float:
    """The higher of the peaks measured before and after: what the machine can do."""
    return max(peak[precision] for peak in peaks.values())


def ratio(result: Mapping[str, Any], numerator: str, denominator: str) -> float | None:
    """Median over the repeats of the seconds of one variant by those of another in the same repeat."""
    pair = [result["variants"].get(name, {}) for name in (numerator, denominator)]
    if numerator == denominator or not all("answers" in found for found in pair):
        return None
    above, below = _seconds(result, numerator), _seconds(result, denominator)
    return median(a / b for a, b in zip(above, below, strict=True))


def _tax(quotient: float | None) -> float | None:
    return None if quotient is None else quotient - 1


def _loss(variant: Variant, result: Mapping[str, Any]) -> dict[str, Any]:
    """How far the losses of all rounds are from those they must equal; ``difference`` is ``None`` if nothing is."""
    answers = result["variants"][variant.name]["answers"]
    other = result["variants"].get(variant.same_loss_as, {}).get("answers")
    comparable = variant.name != variant.same_loss_as and other and other[0]["batch_size"] == answers[0]["batch_size"]
    difference = loss_difference(_losses(answers), _losses(other)) if comparable else None
    allowed = TOLERANCE[variant.precision]
    return {
        "first": answers[0]["loss"],
        "last": answers[-1]["loss"],
        "same_as": variant.same_loss_as,
        "difference": difference,
        "allowed": allowed,
        "right": difference is None or difference <= allowed,
    }


def loss_difference(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference in any round."""
    return max(abs(one - other) for one, other in zip(losses, others, strict=True))


def sound(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every variant ran and trained what it should."""
    return all("error" not in line and line["loss"]["right"] for line in lines)


def _seconds(result: Mapping[str, Any], name: str) -> list[float]:
    return [answer["seconds"] for answer in result["variants"][name]["answers"][1:]]


def _losses(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    return [answer["loss"] for answer in answers]
