"""The start-up script reaches its first step on the default engine."""

from __future__ import annotations

from simulations.benchmark.startup import STAGES, run_once


def test_every_stage_of_a_start_is_reached_in_order() -> None:
    seconds = [wall for wall, _ in run_once()]
    assert len(seconds) == len(STAGES)
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
