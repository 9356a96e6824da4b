"""Folds, alpha fitted after W, and a validation file of one's own: against loops, closed forms and whole runs."""

import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from harness import Runner, abstract_step, pretrained_weights, run, setup_of, shapes_of, trace_step, training_set
from test_cost import TOKENS, WIDTH
from test_in_the_engine import CHUNK, Cut, CutAt, train
from three_weights import DATA, PRETRAINED, batch, gradient
from three_weights import setup as linear_setup

from agwm_jax import InnerState, hypergrad, hypergradient, inner_steps
from agwm_jax.core.cost import matmul_flops
from agwm_jax.data.plan import PADDING
from agwm_jax.engine.checkpoint import Checkpoints
from agwm_jax.engine.group import Member
from agwm_jax.engine.lanes import Programs
from agwm_jax.engine.observer import InMemory
from agwm_jax.errors import AgwmError
from agwm_jax.methods.agwm import Agwm
from agwm_jax.methods.alpha_after import SPLITS
from agwm_jax.methods.interface import Context
from agwm_jax.methods.mixup import ALPHA, Mixture, Mixup
from agwm_jax.methods.search_plans import plans_for_after, search_plans
from agwm_jax.methods.training import TASK
from agwm_jax.settings import load_config
from agwm_jax.settings.config import parse_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

KERNEL = "encoder.query.kernel"
FOLDS = {"splits": "folds", "num_splits": 2, "epochs": 2, "anchor": 0.1, "outer": {"learning_rate": 0.05}}
AFTER = {
    "when": "after",
    "splits": "folds",
    "num_splits": 2,
    "epochs": 4,
    "inner": {"learning_rate": 0.1, "weight_decay": 0.0, "gradient_clip": None},
    "alpha_epochs": 400,
    "outer": {"learning_rate": 0.05},
}


def agwm(setup, search: dict, **settings: Any):
    return Agwm.model_validate({"search": search, **settings}).build(setup)


def rows_of(plan) -> set[int]:
    return set(np.unique(plan[plan != PADDING]).tolist())


def test_folds_are_disjoint_and_w_sees_all_others():
    search = Agwm.model_validate({"search": {"splits": "folds", "num_splits": 3, "epochs": 2}}).search
    plans = search_plans(search, setup_of(batch_size=3))  # 10 examples: folds of 3, 3 and 4
    assert len({(plan["inner"].shape, plan["outer"].shape) for plan in plans}) == 1
    validation = [rows_of(plan["outer"]) for plan in plans]
    assert sorted(len(rows) for rows in validation) == [3, 3, 4]
    assert set.union(*validation) == set(range(10))
    for plan, held_out in zip(plans, validation, strict=True):
        assert rows_of(plan["inner"]) == set(range(10)) - held_out
        assert np.all((plan["inner"] >= 0).any(axis=-1))  # no batch of nothing but padding


def test_plans_of_one_shape_where_folds_need_different_numbers_of_batches():
    search = Agwm.model_validate(
        {"search": {"splits": "folds", "num_splits": 3, "epochs": 2, "when": "after", "alpha_epochs": 4}}
    ).search
    setup = setup_of(batch_size=3)
    train, outer = plans_for_after(search, setup)
    assert train["train"].shape == (2 * 3, 3, 3)  # 7, 7 and 6 examples in batches of 3
    assert outer["outer"].shape == (4 * 2, 3, 3)  # 3, 3 and 4
    for plan in (train["train"], outer["outer"]):
        assert np.all((plan >= 0).any(axis=-1))
    for index in range(3):
        assert rows_of(train["train"][:, index]) == set(range(10)) - rows_of(outer["outer"][:, index])


class TestOneSearchOfAllFolds:
    def test_its_steps_are_those_of_a_loop_over_folds(self):
        """A hypergradient of its own for every fold, their mean, one update of alpha, then every W anew."""
        setup = linear_setup(batch_size=4)
        method = agwm(setup, FOLDS, mixup={"gate": "full", "start": 0.7, "noise": 0.05})
        (phase,) = method.stages[0]
        assert phase.name == "search"
        mixture = Mixture(Mixup(gate="full", start=0.7, noise=0.05), setup)
        search = Agwm.model_validate({"search": FOLDS}).search
        problem = mixture.problem(PRETRAINED, setup.loss(reverse_only=False), anchor=0.1)
        steps = phase.num_steps
        inner_tx = search.inner.build(num_steps=steps, weights=setup.model.weights)
        outer_tx = search.outer.build(num_steps=steps, weights=setup.model.weights)

        initial = method.init(PRETRAINED, jax.random.key(0))
        context = Context(PRETRAINED, initial, initial)
        state = phase.start(context, jax.random.key(5))
        alpha = state.outer
        outer_state = outer_tx.init(alpha)
        inner = [InnerState(initial[TASK], inner_tx.init(initial[TASK])) for _ in range(2)]
        take = jax.jit(phase.step)
        for step in range(3):
            rows = {name: plan[step] for name, plan in phase.plan.items()}
            batches = {name: batch(own) for name, own in rows.items()}
            batches["inner"].pop("key"), batches["outer"].pop("key")
            state, info = take(state, context, batches, jax.random.key(0), jnp.int32(step))
            found = []
            for fold in range(2):
                own = {name: jax.tree.map(lambda x, fold=fold: x[fold], b) for name, b in batches.items()}
                found.append(
                    hypergradient(
                        problem, hypergrad.unrolled(), inner[fold], alpha, own["inner"], own["outer"], inner_tx=inner_tx
                    ).hypergradient
                )
            mean = jax.tree.map(lambda *x: sum(x) / 2, *found)
            assert float(info["hypergradient_norm"]) == pytest.approx(float(optax.tree.norm(mean)), rel=1e-4)
            updates, outer_state = outer_tx.update(mean, outer_state, alpha)
            alpha = mixture.project(optax.apply_updates(alpha, updates))
            for fold in range(2):
                own = jax.tree.map(lambda x, fold=fold: x[fold], batches["inner"])
                inner[fold], _ = inner_steps(problem.inner_loss, inner_tx, inner[fold], alpha, own)
            np.testing.assert_allclose(state.outer[KERNEL], alpha[KERNEL], rtol=1e-5)
            for path in PRETRAINED:
                np.testing.assert_allclose(
                    state.inner.params[path], jnp.stack([x.params[path] for x in inner]), rtol=1e-5, atol=1e-7
                )
        assert np.any(np.abs(alpha[KERNEL] - 0.7) > 0.01)
        learnt = phase.finish(context, state)
        np.testing.assert_allclose(
            learnt[TASK][KERNEL], (inner[0].params[KERNEL] + inner[1].params[KERNEL]) / 2, rtol=1e-5
        )
        np.testing.assert_array_equal(learnt[ALPHA][KERNEL], state.outer[KERNEL])

    def test_it_runs_alone_and_over_seeds(self):
        method = agwm(setup_of(epochs=1), {**FOLDS, "average": "alpha"}, mixup={"gate": "kernel"})
        alone = run(method, pretrained_weights(), jax.random.key(0))
        stacked = jax.tree.map(lambda x: jnp.stack([x, x]), pretrained_weights())
        keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
        together = Runner(method, members=True).run(stacked, keys)
        for path, x in alone.weights.items():
            np.testing.assert_allclose(together.weights[path][0], x, atol=2e-5)


@pytest.mark.parametrize("search", [{"splits": "folds"}, {"when": "after"}, {"splits": "folds", "when": "after"}])
@pytest.mark.parametrize("average", ["all", "alpha"])
def test_what_every_phase_leaves_is_known_before(search, average):
    search = {**search, "num_splits": 2, "validation_fraction": 0.4, "average": average}
    method = agwm(setup_of(), search, mixup={"gate": "one"})
    for number, phase in enumerate(method.phases):
        state, after = trace_step(phase, method.learnt_shapes(shapes_of(), number))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), after)
    learnt = method.learnt_shapes(shapes_of())
    assert learnt.keys() == {TASK, ALPHA}
    assert {path: x.shape for path, x in learnt[TASK].items()} == {path: x.shape for path, x in shapes_of().items()}


class TestAfter:
    def train(self, search, setup=None, **mixup):
        """The phases on the linear problem, step by step."""
        method = agwm(linear_setup(batch_size=5) if setup is None else setup, search, mixup=mixup)
        initial = learnt = method.init(PRETRAINED, jax.random.key(0))
        left = []
        for phase in method.phases[:2]:
            context = Context(PRETRAINED, initial, learnt)
            step, state = jax.jit(phase.step), phase.start(context, jax.random.key(1))
            for index in range(phase.num_steps):
                batches = {name: batch(plan[index]) for name, plan in phase.plan.items()}
                state, _ = step(state, context, batches, jax.random.key(2), jnp.int32(index))
            learnt = phase.finish(context, state)
            left.append(learnt)
        return method, left

    @pytest.mark.parametrize("start", [1.0, 0.5])
    def test_one_number_is_the_least_squares_solution(self, start):
        """``mean_k |x . (w0 + a (w_k - w0)) - y|^2`` over the out-of-fold examples is a parabola in a."""
        # Alpha from full batches, and steps enough to converge.
        method, (before, after) = self.train({**AFTER, "epochs": 60}, gate="one", start=start, noise=0.0)
        top = bottom = 0.0
        for fold in range(2):
            rows = method.phases[1].plan["outer"][0, fold]
            x, y = DATA["x"][rows].astype(float), DATA["y"][rows].astype(float)
            own = {path: np.asarray(w[fold], float) for path, w in before[SPLITS].items()}
            at_0 = np.concatenate([np.ravel({**own, KERNEL: np.asarray(PRETRAINED[KERNEL])}[p]) for p in PRETRAINED])
            at_1 = np.concatenate([np.ravel(own[p]) for p in PRETRAINED])
            along, rest = x @ (at_1 - at_0), y - x @ at_0
            top, bottom = top + along @ rest, bottom + along @ along
        expected = np.clip(top / bottom, 0, 1)
        assert 0.05 < expected < 0.95  # else the projection would be all that is tested
        assert float(after[ALPHA][KERNEL][0, 0]) == pytest.approx(expected, abs=2e-5)
        np.testing.assert_allclose(after[TASK][KERNEL], before[SPLITS][KERNEL].mean(axis=0), rtol=1e-6)

    def test_w_of_a_split_is_plain_training_on_its_part(self):
        search = {**AFTER, "epochs": 1, "alpha_epochs": 1, "average": "alpha"}
        search["inner"] = {**search["inner"], "schedule": "constant", "warmup_fraction": 0.0}
        method, (before, after) = self.train(search, gate="full", noise=0.0)
        plan = method.phases[0].plan["train"]
        for fold in range(2):
            vector = np.concatenate([np.ravel(np.asarray(x, float)) for x in PRETRAINED.values()])
            first = second = np.zeros_like(vector)
            for t, rows in enumerate(plan[:, fold], start=1):
                g = gradient(vector, rows)
                first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
                step = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
                vector = vector - 0.1 * step
            found = np.concatenate([np.ravel(before[SPLITS][path][fold]) for path in PRETRAINED])
            np.testing.assert_allclose(found, vector, rtol=2e-4, atol=2e-5)
        for path in PRETRAINED:  # alpha alone is handed on
            np.testing.assert_array_equal(after[TASK][path], PRETRAINED[path])

    def test_w_trains_through_the_mixture_where_alpha_starts(self):
        """At A = 0 the mixed weight has no gradient, and the anchor pulls it nowhere."""
        search = {**AFTER, "epochs": 1, "alpha_epochs": 1, "anchor": 0.5}
        _, (before, _) = self.train(search, gate="one", start=0.0, noise=0.0)
        before = jax.tree.map(np.asarray, before[SPLITS])
        np.testing.assert_array_equal(before[KERNEL], np.stack([PRETRAINED[KERNEL]] * 2))
        assert np.any(before["classifier.kernel"] != np.asarray(PRETRAINED["classifier.kernel"]))

    def test_the_anchor_keeps_w_near(self):
        free, bound = (
            self.train({**AFTER, "alpha_epochs": 1, "anchor": anchor}, gate="one", noise=0.0)[1][0]
            for anchor in (0.0, 100.0)
        )
        distance = [np.abs(np.asarray(x[SPLITS][KERNEL]) - np.asarray(PRETRAINED[KERNEL])).max() for x in (free, bound)]
        assert distance[1] < 0.5 * distance[0]

    def test_it_runs_alone_and_over_seeds(self):
        search = {"when": "after", "num_splits": 2, "validation_fraction": 0.4, "epochs": 1, "alpha_epochs": 2}
        method = agwm(setup_of(epochs=1), search, mixup={"gate": "layer"})
        alone = run(method, pretrained_weights(), jax.random.key(0))
        assert {"weights", "search", "leverage", "finetune"} == set(alone.infos)
        assert {"loss", "outer_loss", "hypergradient_norm"} <= set(alone.infos["search"])
        stacked = jax.tree.map(lambda x: jnp.stack([x, x]), pretrained_weights())
        keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
        together = Runner(method, members=True).run(stacked, keys)
        for path, x in alone.weights.items():
            np.testing.assert_allclose(together.weights[path][0], x, atol=2e-5)


def test_what_a_step_costs():
    """In forward-backwards: with folds K times a search's 5, for W K, for alpha at most K."""
    shapes, costs = shapes_of(width=WIDTH), {}
    for name, search in (("folds", {"splits": "folds"}), ("after", {"when": "after", "validation_fraction": 0.4})):
        setup = setup_of()
        method = agwm(setup, {**search, "num_splits": 2})
        for number, phase in enumerate(method.phases):
            specs = abstract_step(phase, method.learnt_shapes(shapes, number), tokens=TOKENS, width=WIDTH)
            costs[name, phase.name] = matmul_flops(phase.step, *specs)
            if phase.name == "finetune":
                whole = matmul_flops(jax.value_and_grad(setup.loss(reverse_only=True)), shapes, specs[2]["train"])
    assert costs["folds", "search"] / whole == pytest.approx(2 * 5, abs=0.1)
    assert costs["after", "weights"] / whole == pytest.approx(2, abs=0.02)
    assert 4 / 3 - 0.02 <= costs["after", "search"] / whole <= 2.02


@pytest.mark.parametrize("search", [{"splits": "folds"}, {"when": "after", "validation_fraction": 0.4}])
def test_the_engine_continues_and_spreads_it(search, tmp_path):
    """Cut short within the first phase; then on two devices, all weights cut over both."""
    setup = setup_of(epochs=1, eps=1e-2)
    search = {**search, "num_splits": 2, "epochs": 2, "inner": {"eps": 1e-2}, "outer": {"eps": 1e-2}}
    method = agwm(setup, search, mixup={"gate": "head"}, estimator={"name": "first_order"})
    pretrained, data = jax.tree.map(np.asarray, (pretrained_weights(), training_set()))
    member, programs, whole = Member(0, method, pretrained, data, jax.random.key(5)), Programs(), InMemory(1)
    learnt = train(member, whole, programs=programs)
    assert method.phases[0].num_steps > CHUNK
    for cut, observer in ((True, CutAt(1)), (False, InMemory(1))):
        checkpoints = Checkpoints(tmp_path, keep=1, fingerprint="")
        try:
            continued = train(member, observer, programs=programs, checkpoint_minutes=1e-9, checkpoints=checkpoints)
        except Cut:
            assert cut
        checkpoints.close()
    chex.assert_trees_all_equal(continued, learnt)
    chex.assert_trees_all_close(train(member, InMemory(1), devices=2), learnt, atol=2e-5, rtol=2e-5)


def test_a_file_holds_out_nothing():
    setup = setup_of()._replace(rows={"/clean.csv": range(10, 16)})
    settings = Agwm.model_validate({"search": {"validation": "/clean.csv", "num_splits": 2}})
    assert settings.reads == ("/clean.csv",)
    assert Agwm().reads == ()
    for plan in search_plans(settings.search, setup):
        assert rows_of(plan["inner"]) == set(range(10))
        assert rows_of(plan["outer"]) == set(range(10, 16))
    train, outer = plans_for_after(settings.search, setup)
    assert rows_of(train["train"]) == set(range(10))
    assert rows_of(outer["outer"]) == set(range(10, 16))


def test_split_is_a_word_and_all_else_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for said, read in (
        ("split", "split"),
        ("clean.csv", str(tmp_path / "clean.csv")),
        ("./split", f"{tmp_path}/split"),
    ):
        words = ["--model", "m", "--output", "o", "--method.search.validation", said]
        assert load_config(None, words).method.search.validation == read


@pytest.mark.parametrize(
    ("search", "message"),
    [
        (
            {"num_splits": 11},
            "11 folds of 10 training examples have 0 each, fewer than one batch of 4: ask for 2 folds",
        ),
        ({"num_splits": 3}, "3 folds of 10 training examples have 3 each, fewer than one batch of 4: ask for 2 folds"),
    ],
)
@pytest.mark.parametrize("when", ["during", "after"])
def test_folds_without_a_batch_are_refused(search, message, when):
    with pytest.raises(AgwmError, match=message):
        agwm(setup_of(), {"splits": "folds", "when": when, **search})


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ({"splits": "folds"}, ["method.search.num_splits: got 1", "2 or more with splits folds"]),
        ({"splits": "folds", "num_splits": 2, "validation": "/a.csv"}, ["method.search.splits: got folds", "file"]),
        ({"when": "after", "inner_steps": 2}, ["method.search.inner_steps: got 2", "when after"]),
        ({"alpha_epochs": 0}, ["method.search.alpha_epochs", "a whole number >= 1"]),
        ({"when": "later"}, ["method.search.when: got 'later'", "one of during, after"]),
    ],
)
def test_settings_that_do_not_go_together(search, words):
    with pytest.raises(AgwmError) as raised:
        parse_config({"method": {"search": json.loads(json.dumps(search))}})
    assert [word for word in words if word not in str(raised.value)] == []
