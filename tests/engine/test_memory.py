"""The estimate of memory against what the compiler counts, and what is chosen and refused because of it."""

import csv

import jax
import numpy as np
import pytest

from agwm_jax.engine import lanes, memory
from agwm_jax.engine.memory import SideBySide, choose, estimate
from agwm_jax.engine.sharding import make_placement
from agwm_jax.engine.step_memory import STEPS, step_name, temporaries
from agwm_jax.errors import AgwmError
from agwm_jax.settings.config import Config

SMALL = ((3, 128, 2, 512), 1000, 16, 64)  # layers, width, heads, feed-forward width; words, batch, length
WIDE = ((4, 384, 12, 1536), 8000, 4, 32)  # weights and not activations fill the memory
UNROLLED = {"estimator": "unrolled"}
NEUMANN = {"estimator": "neumann"}


@pytest.fixture
def shapes(request, monkeypatch):
    monkeypatch.syspath_prepend(request.config.rootpath / "experiments")
    import shapes

    return shapes


def settings(hypergradient=None, *, method="agwm", batch=16, run=None, model=None, **search) -> Config:
    found = {
        "task": {"source": "agreement", "train_size": 5 * batch},
        "method": {"name": method},
        "data": {"batch_size": batch},
        "search": {"rollback": False, **search},
        "hypergradient": hypergradient or UNROLLED,
        "model": model or {},
        "run": run or {},
    }
    return Config.model_validate(found)


def one_device(**axes):
    return make_placement(**{"seed": 1, "data": 1, "model": 1, "fully_sharded": False} | axes)


def build(shapes, size, config):
    (layers, width, heads, inner), words, _, length = size
    model = shapes.bert(layers, width, heads, inner, vocabulary=words, length=max(length, 40))
    return shapes.build_shapes(config, model, length=length)


def compare(shapes, monkeypatch, size, config, placement, **side_by_side):
    """Estimated over counted bytes of the temporaries of the first phase."""
    # The machine code itself is of no interest here.
    quick = {**lanes.compiler_options(), "xla_backend_optimization_level": 0}
    monkeypatch.setattr(lanes, "compiler_options", lambda: quick)
    built = build(shapes, size, config)
    compiled = shapes.compile_phase(built, placement, **side_by_side)
    count = int(np.prod(list(side_by_side.values()))) if side_by_side else 1
    searches = config.method.name == "agwm"
    return count * temporaries(config, built, placement, searches=searches) / compiled.temporaries


def test_the_temporaries_of_a_step_are_within_a_quarter(shapes, monkeypatch):
    assert 0.75 < compare(shapes, monkeypatch, SMALL, settings(method="vanilla"), one_device()) < 1.25
    several = settings(batch=4, inner_steps=2, model={"dropout": 0.0})
    assert 0.75 < compare(shapes, monkeypatch, WIDE, several, one_device()) < 1.25


def test_independent_gradients_are_taken_one_after_the_other(shapes, monkeypatch):
    built = build(shapes, SMALL, settings({"estimator": "first_order"}))
    quick = {"xla_backend_optimization_level": 0}
    found = []
    for options in ({**lanes.compiler_options(), **quick}, quick):
        monkeypatch.setattr(lanes, "compiler_options", lambda options=options: options)
        found.append(shapes.compile_phase(built, one_device()).temporaries)
    assert found[0] < 0.8 * found[1]


def test_lanes_and_meshes_multiply_and_divide_the_temporaries(shapes, monkeypatch):
    cut = one_device(data=2, model=2, fully_sharded=True)
    assert 0.65 < compare(shapes, monkeypatch, SMALL, settings({"estimator": "first_order"}), cut, seeds=2) < 1.35


def test_two_seeds_take_twice_the_temporaries_of_one(shapes, monkeypatch):
    solver = settings(NEUMANN | {"num_terms": 3})
    one, two = (compare(shapes, monkeypatch, SMALL, solver, one_device(), seeds=n) for n in (1, 2))
    assert two == pytest.approx(one, rel=0.05), "the estimate is linear in them"


def test_what_has_a_shape_is_counted_exactly(shapes):
    config = settings(batch=4, num_splits=2)
    built = build(shapes, WIDE, config)
    task, frozen = (sum(x.size * 4 for x in tree.values()) for tree in (built.initial.task, built.frozen))
    alpha = sum(x.size * 4 for x in jax.tree.leaves(built.initial.alpha))
    found = estimate(config, built, one_device(), SideBySide(3, 2))
    assert found.weights == frozen + task + 3 * alpha
    assert found.state == pytest.approx(6 * (3 * task + 3 * alpha), rel=1e-4)  # Adam's step counts are the rest
    assert found.total == sum(found)
    assert found.carry == 0
    # One split after the other: what the first one learnt lies there while the second runs.
    assert estimate(config, built, one_device(), SideBySide(3, 1)).carry == 3 * (task + alpha)


def test_a_mesh_divides_what_it_cuts(shapes):
    config = settings(batch=8)
    built = build(shapes, WIDE, config)

    def on(**axes):
        return estimate(config, built, one_device(**axes), SideBySide(4, 1))

    alone, by_seed, by_data = on(), on(seed=4), on(data=4)
    assert (by_seed.state, by_seed.temporaries) == (alone.state // 4, alone.temporaries // 4)
    assert by_data.state == alone.state  # every device holds all weights
    assert by_data.temporaries < alone.temporaries
    assert on(data=4, fully_sharded=True).state < 0.3 * alone.state
    assert 0.5 * alone.state < on(model=2).state < 0.8 * alone.state  # embeddings stay whole


def test_accelerators_take_less_in_bfloat16(shapes):
    config = settings(model={"dtype": "bfloat16"})
    built = build(shapes, SMALL, config)
    cpu, gpu = (temporaries(config, built, one_device(), searches=True, platform=name) for name in ("cpu", "gpu"))
    assert 0.5 < gpu / cpu < 0.8


def test_every_estimator_has_constants():
    every = [{"estimator": "first_order"}, {"estimator": "penalty"}, {"estimator": "finite_difference"}]
    every += [{"estimator": "finite_difference", "precondition": True}]
    every += [UNROLLED | {"hvp": hvp} for hvp in ("linearize", "jvp", "finite_difference")]
    for name in ("neumann", "gradient_descent", "conjugate_gradient", "nystrom"):
        for curvature in ("hessian", "gauss_newton"):
            found = {"estimator": name, "curvature": curvature}
            every += [found | {"hvp": hvp} for hvp in ("linearize", "jvp", "finite_difference")]
    used = {step_name(settings(each), True) for each in every} | {"plain", "finetune"}
    assert used == set(STEPS)


@pytest.fixture
def fits(shapes, monkeypatch):
    """``fits(config, num_seeds, lanes) -> SideBySide``: the choice where `lanes` lanes (a float) are what fits."""

    def choice(config, num_seeds, lanes, size=WIDE, **axes):
        placement = one_device(**axes)
        built = build(shapes, size, config)
        one, two = (
            estimate(config, built, placement, SideBySide(n * placement.mesh.shape["seed"], 1)).total for n in (1, 2)
        )
        monkeypatch.setattr(memory, "limit", lambda built, placement: (one + (lanes - 1) * (two - one)) / memory.USABLE)
        return choose(config, built, placement, num_seeds=num_seeds)

    return choice


def vectorize(how, **changes):
    return settings(batch=4, num_splits=3, run={"vectorize": how}, **changes)


def test_as_many_lanes_as_fit_go_side_by_side(fits):
    assert fits(vectorize("auto"), 4, 14) == SideBySide(4, 3)
    assert fits(vectorize("auto"), 4, 9.9) == SideBySide(3, 3)  # a group of three seeds, then the fourth
    assert fits(vectorize("auto"), 4, 4.9) == SideBySide(4, 1)
    assert fits(vectorize("auto"), 2, 3.5) == SideBySide(1, 3)
    assert fits(vectorize("auto"), 4, 1.2) == SideBySide(1, 1)
    assert fits(vectorize("auto", method="vanilla"), 4, 14) == SideBySide(4, 1)


def test_what_is_said_is_done(fits):
    assert fits(vectorize("none"), 4, 99) == SideBySide(1, 1)
    assert fits(vectorize("seeds"), 4, 99) == SideBySide(4, 1)
    assert fits(vectorize("splits"), 4, 99) == SideBySide(1, 3)
    assert fits(vectorize("all"), 4, 99) == SideBySide(4, 3)


def test_devices_share_the_seeds_evenly(fits):
    assert fits(vectorize("auto"), 4, 1.1, seed=2) == SideBySide(2, 1)
    with pytest.raises(AgwmError, match=r"mesh\.seed 2 does not divide the 3 seeds .* multiple of 2"):
        fits(vectorize("seeds"), 3, 99, seed=2)
    with pytest.raises(AgwmError, match=r"mesh\.seed 2 does not divide one seed, all that run\.vectorize none"):
        fits(vectorize("none"), 4, 99, seed=2)


def test_a_refusal_says_what_would_fit(fits):
    refused = r"4 seeds x 3 splits side by side would need [\d.]+ GB of a device, [\d.]+ GB can be used; would fit: "
    with pytest.raises(AgwmError, match=refused + r"run\.vectorize auto with 2 seeds x 3 splits at once \([\d.]+ GB\)"):
        fits(vectorize("all"), 4, 6.5)
    alone = r"one run alone would need .* would fit: "
    with pytest.raises(AgwmError, match=alone + r".*hypergradient\.hvp (jvp|finite_difference) .*data\.batch_size \d+"):
        fits(settings(NEUMANN), 1, 0.7, size=SMALL)
    with pytest.raises(AgwmError, match=alone + r"mesh\.fully_sharded true on these 4 devices \([\d.]+ GB\)"):
        fits(settings({"estimator": "first_order"}, batch=4), 1, 0.6, data=4)
    with pytest.raises(AgwmError, match=alone + r".*mesh\.data 8 with mesh\.fully_sharded true on the 8 devices here"):
        fits(settings({"estimator": "first_order"}, batch=8), 1, 0.6)


def test_a_refusal_says_when_no_one_change_is_enough(fits, shapes, monkeypatch):
    with pytest.raises(
        AgwmError, match=r"even a batch of 1 with hypergradient\.hvp .* needs [\d.]+ GB: spread it over"
    ):
        fits(settings(batch=4), 1, -5)
    ways = [NEUMANN | {"hvp": hvp} for hvp in ("linearize", "jvp", "finite_difference")]
    configs = [settings(way, batch=n) for way in ways for n in (2, 1)]
    built = build(shapes, WIDE, configs[0])
    found = sorted(estimate(config, built, one_device()).total for config in configs)
    monkeypatch.setattr(memory, "limit", lambda built, placement: (found[0] + 1000) / memory.USABLE)
    with pytest.raises(AgwmError, match=r"no one change is enough, but a batch of 1 with hypergradient\.hvp jvp is \("):
        choose(configs[0], built, one_device(), num_seeds=1)


def test_a_cpu_s_devices_share_its_memory(shapes, monkeypatch):
    built = build(shapes, SMALL, settings())
    monkeypatch.setattr(memory, "_container_limit", lambda: 10e9)
    monkeypatch.setattr(memory.os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 4_000_000)
    alone, shared = memory.limit(built, one_device()), memory.limit(built, one_device(data=4))
    assert 9.3e9 < alone < 9.4e9
    assert shared == alone // 4


def test_the_page_s_tables_and_figure_come_from_the_estimate_and_the_rows(request, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(request.config.rootpath / "experiments")
    import scaling

    docs = request.config.rootpath / "docs"
    page = (docs / "scaling.md").read_text()
    tables = {"constants": scaling.constants_table(), "memory bfloat16": scaling.memory_table("bfloat16")}
    assert scaling.replace_blocks(page, tables) == page, "run: python experiments/scaling.py --only tables"
    with (docs / "scaling.csv").open(newline="") as file:
        rows = [{k: v if k == "grows" else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    expected = {(name, value) for name, values in scaling.GROWS.items() for value in values}
    assert {(row["grows"], row["value"]) for row in rows} == expected, "run: python experiments/scaling.py"
    for row in rows:  # counted, so the same on every machine: nothing but attention grows faster than linearly
        first = next(other for other in rows if other["grows"] == row["grows"])
        faster = 1.2 if row["grows"] == "length" else 1.001
        assert row["flops"] / first["flops"] <= faster * row["value"] / first["value"]
    assert scaling.draw(rows, tmp_path / "figure.png").stat().st_size > 50_000
