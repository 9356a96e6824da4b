"""Rates by the encoder's width, passes by the number of texts, times as people write them."""

import pytest

from agwm_jax import AgwmError, load_config
from agwm_jax.selection.trials import METHODS_TRIED, all_methods, check_methods, factors, passes, rates, seconds_of


def test_rates_go_by_width_and_passes_by_size():
    assert factors(384) == pytest.approx((5, 15, 5 / 3))
    assert factors(768) == pytest.approx((2.5, 7.5, 5 / 6))
    assert [passes(n, 16) for n in (16, 160, 300, 1999, 2000, 8000)] == [60, 6, 5, 5, 3, 3]


@pytest.mark.parametrize("method", all_methods())
def test_a_factor_multiplies_every_rate_of_a_method(method):
    once, twice = (load_config(None, ["--method", method, *rates(method, factor)]) for factor in (1.0, 2.0))
    before = load_config(None, ["--method", method])
    assert once == before  # a factor of one is the default
    changed = {key for key, value in flat(twice).items() if value != flat(once)[key]}
    # What is left is a rate of another thing: of gates, scores or perturbations.
    left = {key for key in flat(once) if key.endswith("learning_rate")} - changed
    assert "finetune.optimizer.learning_rate" in changed
    assert all(key.endswith("learning_rate") for key in changed)
    assert all("inner" not in key and "first." not in key and key != "method.learning_rate" for key in left)


def flat(config):
    found = {}

    def visit(value, path):
        if isinstance(value, dict):
            for name, each in value.items():
                visit(each, f"{path}.{name}".strip("."))
        else:
            found[path] = value

    visit(config.model_dump(mode="json"), "")
    return found


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("10min", 600), ("1.5h", 5400), (" 2 m ", 120)])
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "0", "-5min", "10 days"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(AgwmError, match=r"--budget: got .* allowed: a time such as 90s, 10min or 1h"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["probe", "vanila"], "vanila.*vanilla"),
        (["probe", "probe"], "one is given twice"),
        (["zero_shot"], "zero_shot trains nothing"),
    ],
)
def test_methods_that_cannot_be_compared(names, sentence):
    with pytest.raises(AgwmError, match=sentence):
        check_methods(names)
    check_methods(METHODS_TRIED)
