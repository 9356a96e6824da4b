"""Whether a gate mattered, in words."""

import math

import numpy as np
import pytest

from agwm_jax.report.gates import BINS, Gates
from agwm_jax.report.leverage import leverage, row, verdict
from agwm_jax.report.plots import panels_with_data


def gates_at(value):
    counts = np.zeros(BINS)
    counts[min(BINS - 1, int(value * BINS))] = 10
    return Gates({}, {"pooler": value}, counts)


def records(learnt, opened, number, best=0.5):
    last = {"validation_loss": learnt, "open_loss": opened, "number_loss": number, "best_number": best}
    return [[{"phase": "search-0"}, {"phase": "leverage", **last, "alpha_agreement": 0.0}, {"phase": "finetune"}]]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ((0.5, 0.501, 0.501), "did not matter"),
        ((0.5, 0.6, 0.501), "One number would have done"),
        ((0.5, 0.6, 0.55), "did matter"),
        ((0.6, 0.5, 0.5), "did not matter"),
        ((0.72, 0.725, 0.7), "with A = 1; A = 0.5 everywhere would give 0.7000."),
    ],
)
def test_the_verdict_goes_by_the_losses(losses, words):
    assert words in verdict(leverage(gates_at(0.7), 1.0, records(*losses)))


def test_a_gate_without_a_search_has_no_losses():
    found = leverage(gates_at(0.7), 1.0, [[{"phase": "finetune"}]])
    assert math.isnan(found.learnt)
    assert "not fitted on examples of its own" in verdict(found)
    assert row("x", found)["loss, A = 1"] == "-"


def test_how_far_a_moved_and_what_is_at_a_bound():
    found = leverage(gates_at(0.7), 0.9, records(1, 1, 1))
    assert found.travelled == pytest.approx(0.2, abs=1e-3)
    assert found.at_a_bound == 0
    assert math.isnan(found.agreement)  # one split has nothing to agree with
    assert leverage(gates_at(1.0), 1.0, records(1, 1, 1)).at_a_bound == 1


def test_reading_is_no_learning_curve():
    """Nothing is trained in it: a panel of its losses would take the place of one of training."""
    steps = [{"phase": phase, "step": 0, "loss": 1.0} for phase in ("search-0", "leverage", "finetune")]
    assert [panel.phase for panel in panels_with_data({"agwm": [steps]})] == ["search", "finetune"]
