"""Whatever is said of a private run says that it is simulated."""

from __future__ import annotations

import pytest

from fedlora.privacy.statement import SIMULATED, privacy_summary, private_label


@pytest.mark.parametrize("unit", ["record", "client"])
@pytest.mark.parametrize("epsilon", [3.14159, None])
def test_every_statement_is_one_sentence_that_says_simulated_not_private(unit, epsilon) -> None:
    summary = privacy_summary(unit, epsilon, 1e-3, 1.5, 0.1, "rdp", condition="and who took part in a round")
    assert summary["statement"].endswith(f"{SIMULATED}." if epsilon else f"({SIMULATED}).")
    assert summary["statement"].count(". ") == 0
    assert summary["simulated"] is True
    assert ("ε = 3.142, δ = 0.001" in summary["statement"]) == (epsilon is not None)
    assert ("who took part" in summary["statement"]) == (epsilon is not None)
    assert unit in summary["statement"]
    assert SIMULATED in private_label("ffa", unit, deployed=False)


@pytest.mark.parametrize("unit", ["record", "client"])
def test_the_statement_of_a_deployed_run_is_a_guarantee(unit) -> None:
    summary = privacy_summary(unit, 3.14159, None, None, 0.1, "rdp", deployed=True)
    assert "are (ε = 3.142, δ = of each client)-differentially private" in summary["statement"]
    assert summary["simulated"] is False
    assert SIMULATED not in summary["statement"] + private_label("ffa", unit, deployed=True)
