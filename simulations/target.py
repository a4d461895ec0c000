"""What it took to reach a target: rounds, bytes and seconds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def cost_of_target(rounds: Sequence[Mapping[str, Any]], metric: str, target: float) -> dict[str, Any]:
    """When the validation metric first was at least ``target``, among the rounds that were evaluated.

    Where nothing is validated (``data.split.validation=0``, as in papers that test personal models only), the metric of
    clients' own test rows is taken.

    Args:
        rounds: the lines of ``rounds.jsonl``, in order.
        metric: the main metric; higher is better.
        target: the value to reach.

    Returns:
        ``metric`` and ``value`` asked for, and ``round``, ``bytes`` (all messages up to and with that round, setup
        included) and ``seconds``; the last three are ``None`` where the target was never reached.
    """
    validation, seen = f"validation_{metric}", f"seen_{metric}"
    key = validation if any(validation in record["metrics"] for record in rounds) else seen
    reached: dict[str, Any] = {"round": None, "bytes": None, "seconds": None}
    for number, record in enumerate(rounds):
        if record["metrics"].get(key, -math.inf) >= target:
            until = rounds[: number + 1]
            reached = {
                "round": record["round"],
                "bytes": sum(r["message_up"] + r["message_down"] for r in until),
                "seconds": round(math.fsum(s for r in until for s in r["seconds"].values()), 3),
            }
            break
    return {"metric": key, "value": target, **reached}
