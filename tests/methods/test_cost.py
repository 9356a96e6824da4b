"""The counted matrix products of a step, in forward-backwards of the model: what each method says it costs."""

from fractions import Fraction

import jax
import pytest
from harness import abstract_step, setup_of, shapes_of
from short_settings import section
from test_conformance import labels_of

from agwm_jax.core.cost import matmul_flops
from agwm_jax.methods.interface import METHODS

WIDTH, TOKENS = 256, 256
# Where the registry names another table: unrolled through one step (4), and the step taken anew. And the last step of a
# pass with two batches of the development split.
ELSEWHERE = {("agwm", "search"): "5", ("early_stopping", "finetune"): "5/3"}


@pytest.mark.parametrize("name", METHODS)
def test_a_step_costs_what_the_registry_says(name):
    """In forward-backwards of the model: "1", "2/3 to 1", or one of these for each phase, "fisher: 1; finetune: 1"."""
    shapes = shapes_of(width=WIDTH)  # a head of three, whatever the method: it costs next to nothing
    entry, setup = METHODS[name], setup_of(num_labels=labels_of(name))._replace(shapes=shapes)
    method = entry.value.model_validate(section(name)).build(setup)
    arguments = [
        abstract_step(phase, method.learnt_shapes(shapes, number), tokens=TOKENS, width=WIDTH)
        for number, phase in enumerate(method.phases)
    ]
    if not arguments:
        assert entry.facts["cost"] == "0"
        return
    batch = next(specs[2]["train"] for specs in arguments if "train" in specs[2])
    whole = matmul_flops(jax.value_and_grad(setup.loss(reverse_only=True)), shapes, batch)
    stated = dict(part.rpartition(": ")[::2] for part in entry.facts["cost"].split("; "))
    for phase, specs in zip(method.phases, arguments, strict=True):
        kind = phase.name.split("-")[0]
        text = ELSEWHERE.get((name, kind)) or stated.get(kind, stated.get(""))
        low, high = (float(Fraction(end)) for end in (text.split(" to ") * 2)[:2])
        cost = matmul_flops(phase.step, *specs) / whole
        assert low - 0.02 <= cost <= high + 0.02, (phase.name, cost)
