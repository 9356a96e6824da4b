"""The gates that `mixup.gate` may choose: what each has a number for in every family, and that all run."""

import json
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from harness import Runner, pretrained_weights, run, setup_of, shapes_of, tiny_model, trace_step

from agwm_jax.core.deferred import materialise
from agwm_jax.errors import AgwmError
from agwm_jax.methods.agwm import Agwm
from agwm_jax.methods.interface import METHODS, Context
from agwm_jax.methods.mixup import ALPHA, Gate, Mixture, Mixup
from agwm_jax.methods.training import TASK
from agwm_jax.models.family import FAMILIES, build_model
from agwm_jax.report.gates import read_gates
from agwm_jax.report.runs import Run
from agwm_jax.runs.variables import Origin, save_variables
from agwm_jax.settings.config import parse_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

GATES = get_args(Gate)
KINDS = [*((gate, "projection") for gate in GATES), *((gate, "sigmoid") for gate in ("low_rank", "head", "one"))]
QUERY, VALUE, POOLER = "encoder.layers.query.kernel", "encoder.layers.value.kernel", "pooler.kernel"
SHAPES = {  # of the tiny model: two layers of width 6 with two heads
    "full": {QUERY: (2, 6, 6), VALUE: (2, 6, 6), POOLER: (6, 6)},
    "row": {QUERY: (2, 6, 1), VALUE: (2, 6, 1), POOLER: (6, 1)},
    "column": {QUERY: (2, 1, 6), VALUE: (2, 1, 6), POOLER: (1, 6)},
    "head": {QUERY: (2, 1, 2), VALUE: (2, 1, 2), POOLER: (1, 1)},
    "kernel": {QUERY: (2, 1, 1), VALUE: (2, 1, 1), POOLER: (1, 1)},
    "layer": {QUERY: (2, 1, 1), POOLER: (1, 1)},
    "one": {QUERY: (1, 1)},
}


def mixture_of(gate, setup=None, **settings) -> Mixture:
    return Mixture(Mixup(gate=gate, **settings), setup_of() if setup is None else setup)


@pytest.mark.parametrize("gate", SHAPES)
def test_what_has_a_number(gate):
    alpha = mixture_of(gate).init_alpha(jax.random.key(0), pretrained_weights())
    assert {path: x.shape for path, x in alpha.items()} == SHAPES[gate]


@pytest.mark.parametrize(("gate", "parametrisation"), KINDS)
def test_forward_and_merge_are_the_mixture_of_what_the_gates_say(gate, parametrisation):
    mixture = mixture_of(gate, start=0.6, noise=0.2, parametrisation=parametrisation)
    pretrained, task = pretrained_weights(seed=0), pretrained_weights(seed=1)
    alpha = mixture.init_alpha(jax.random.key(0), pretrained)
    variables = {TASK: task, ALPHA: alpha}
    merged = mixture.merge(pretrained, variables)
    layers = mixture.forward(pretrained, variables, jax.random.key(1))
    for path in (QUERY, VALUE, POOLER):
        factors = mixture.gates(alpha)[path]
        a = np.asarray(factors.left @ factors.right if gate == "low_rank" else factors)
        assert np.all((a >= 0) & (a <= 1))
        expected = a * task[path] + (1 - a) * pretrained[path]
        np.testing.assert_allclose(merged[path], expected, rtol=1e-5, atol=1e-6)
        layer = layers[path]
        if path != POOLER:  # as the model's scan takes it
            layer = jax.lax.map(materialise, layer)
        np.testing.assert_allclose(layer, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["classifier.kernel"], task["classifier.kernel"])


@pytest.mark.parametrize("gate", GATES)
def test_at_1_every_gate_gives_the_task_weights_bit_for_bit(gate):
    mixture, pretrained, task = mixture_of(gate, noise=0.0), pretrained_weights(seed=0), pretrained_weights(seed=1)
    variables = {TASK: task, ALPHA: mixture.init_alpha(jax.random.key(0), pretrained)}
    for path, weight in mixture.merge(pretrained, variables).items():
        np.testing.assert_array_equal(weight, task[path])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_has_its_own_columns_of_what_makes_it_and_rows_of_what_reads_it(family):
    values = {
        "vocab_size": 20,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 16,
        "max_position_embeddings": 12,
    }
    entry = FAMILIES[family].value()
    config = entry.read_config({"model_type": next(iter(entry.model_types)), **values})
    model, shapes = build_model(entry, config, num_labels=2)
    assert model.num_heads == 3
    setup = setup_of()._replace(model=model, shapes=shapes)
    mixture = mixture_of("head", setup, start=0.5)
    alpha = jax.eval_shape(mixture.init_alpha, jax.random.key(0), shapes)
    found = {path.removeprefix("encoder.layers."): x.shape for path, x in alpha.items()}
    depth = config.depth
    makers = [path for path, weight in model.weights.items() if weight.is_matrix and weight.axes[-1] == "heads"]
    made = {path.removeprefix("encoder.layers."): (depth, 1, 3) for path in makers}
    assert "query.kernel" in made
    assert made.items() <= found.items()
    assert found.pop("attention_output.kernel") == (depth, 3, 1)
    alone = any(not model.weights[path].is_stacked for path in alpha)
    others = {shape for name, shape in found.items() if name not in made}
    assert others == {(depth, 1, 1)} | ({(1, 1)} if alone else set())
    # The second head at 0, all else at 1: its columns alone are the pretrained ones.
    own = {path: np.ones(x.shape, np.float32) for path, x in alpha.items()}
    own["encoder.layers.query.kernel"][:, :, 1] = own["encoder.layers.attention_output.kernel"][:, 1] = 0
    gates = mixture.gates(jax.tree.map(jnp.asarray, own))
    columns = np.broadcast_to(gates["encoder.layers.query.kernel"], (depth, 12, 12))
    rows = np.broadcast_to(gates["encoder.layers.attention_output.kernel"], (depth, 12, 12))
    for a in (columns, rows.swapaxes(1, 2)):
        assert np.all(a[..., 4:8] == 0)
        assert np.all(a[..., :4] == 1)
        assert np.all(a[..., 8:] == 1)


def test_a_model_that_does_not_say_its_heads_is_refused():
    setup = setup_of(model=tiny_model()._replace(num_heads=None))
    with pytest.raises(AgwmError, match=r"method\.mixup\.gate head needs the number of attention heads"):
        mixture_of("head", setup)
    mixture_of("row", setup)


@pytest.mark.parametrize("gate", GATES)
def test_a_search_of_every_gate_keeps_its_state(gate):
    settings = {"mixup": {"gate": gate}, "search": {"epochs": 1, "validation_fraction": 0.4}}
    method = Agwm.model_validate(settings).build(setup_of())
    for number, phase in enumerate(method.phases):
        state, after = trace_step(phase, method.learnt_shapes(shapes_of(), number))
        assert jax.tree.structure(state) == jax.tree.structure(after)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(lambda x: (x.shape, x.dtype), after)


@pytest.mark.parametrize(
    "mixup",
    [
        {"gate": "layer", "start": 0.8, "parametrisation": "sigmoid", "noise": 0.0},
        {"gate": "head", "start": 0.99, "noise": 0.0},  # steps of 0.05 lead above 1
    ],
)
def test_few_numbers_are_learnt_alone_and_over_seeds(mixup):
    search = {"epochs": 2, "validation_fraction": 0.4, "outer": {"learning_rate": 0.05}}
    method = Agwm.model_validate({"mixup": mixup, "search": search}).build(setup_of(epochs=1))
    mixture = mixture_of(**mixup)
    alone = run(method, pretrained_weights(), jax.random.key(0))
    gates = mixture.gates(alone.learnt[ALPHA])
    assert any(np.any(np.abs(a - mixup["start"]) > 0.01) for a in gates.values())
    assert all(np.all((a >= 0) & (a <= 1)) for a in gates.values())
    start = mixture.init_alpha(jax.random.key(0), pretrained_weights())
    assert float(method.phases[0].monitor(_Searched(start))["alpha_mean"]) == pytest.approx(mixup["start"])  # A itself
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), pretrained_weights())
    keys = jnp.stack([jax.random.key(0), jax.random.key(1)])
    together = Runner(method, members=True).run(stacked, keys)
    for path, x in alone.learnt[ALPHA].items():
        np.testing.assert_allclose(together.learnt[ALPHA][path][0], x, atol=2e-5)


@pytest.mark.parametrize(("parametrisation", "kept"), [("projection", [0.0, 0.5, 1.0]), ("sigmoid", [-3.0, 0.5, 4.0])])
def test_before_a_sigmoid_nothing_is_clipped(parametrisation, kept):
    mixture = mixture_of("column", start=0.5, parametrisation=parametrisation)
    projected = mixture.project({QUERY: jnp.array([[-3.0, 0.5, 4.0]])})
    np.testing.assert_array_equal(projected[QUERY], [kept])
    settings = {"mixup": {"gate": "kernel", "start": 0.9, "noise": 0.0, "parametrisation": parametrisation}}
    (phase,) = Agwm.model_validate({**settings, "search": {"validation_fraction": 0.4}}).build(setup_of()).stages[0]
    variables = {TASK: pretrained_weights(), ALPHA: {}}
    state = phase.start(Context(pretrained_weights(), variables, variables), jax.random.key(0))
    assert float(phase.monitor(state)["alpha_mean"]) == pytest.approx(0.9)


class _Searched(NamedTuple):
    outer: dict


@pytest.mark.parametrize("gate", ["column", "one"])
def test_frozen_alpha_at_0_keeps_the_pretrained_kernels(gate):
    settings = {"name": "frozen_alpha", "mixup": {"gate": gate, "start": 0, "noise": 0.0}}
    method = METHODS["frozen_alpha"].value.model_validate(settings).build(setup_of(epochs=1))
    trained, before = run(method, pretrained_weights(), jax.random.key(0)), pretrained_weights()
    np.testing.assert_array_equal(trained.weights[QUERY], before[QUERY])
    assert np.any(trained.weights["classifier.kernel"] != before["classifier.kernel"])


@pytest.mark.parametrize(
    ("mixup", "words"),
    [
        ("start: 1, parametrisation: sigmoid", ["method.mixup.start: got 1", "above 0 and below 1", "sigmoid"]),
        ("start: 0, parametrisation: sigmoid", ["method.mixup.start: got 0"]),
        ("start: 1.2", ["method.mixup.start", "1.2", "a number >= 0 and <= 1"]),
        ("gate: row, rank: 2", ["method.mixup.rank: got 2", "gate row, which has no factors"]),
        ("gate: row, complement: factored", ["method.mixup.gate: got row", "low_rank"]),
        ("gate: heads", ["method.mixup.gate: got 'heads'", "did you mean head?"]),
        ("rank: half", ["method.mixup.rank", "'half'", "a whole number >= 1"]),
    ],
)
def test_settings_that_do_not_go_together(mixup, words):
    with pytest.raises(AgwmError) as raised:
        parse_config({"method": {"mixup": yaml.safe_load("{" + mixup + "}")}})
    assert [word for word in words if word not in str(raised.value)] == []


def test_full_was_a_rank_once():
    assert Mixup.model_validate({"rank": "full"}) == Mixup(gate="full")


@pytest.mark.parametrize(("gate", "parametrisation"), KINDS)
def test_a_report_sees_the_gate_itself(tmp_path, gate, parametrisation):
    mixup = Mixup(gate=gate, start=0.7, noise=0.1, parametrisation=parametrisation)
    mixture, setup = Mixture(mixup, setup_of()), setup_of()
    alpha = mixture.init_alpha(jax.random.key(0), pretrained_weights())
    learnt = jax.tree.map(np.asarray, {ALPHA: alpha})
    method = json.loads(Agwm(mixup=mixup).model_dump_json())
    save_variables(tmp_path, learnt, Origin(method, ""), weights=list(setup.model.weights))
    found = read_gates(Run(tmp_path, {}, "agwm", "task", 0, None))
    of_path = mixture.gates(alpha)
    if gate == "low_rank":
        of_path = {path: factors.left @ factors.right for path, factors in of_path.items()}
    if gate == "one":
        assert found.layers == {}
        assert found.single == {"all kernels": pytest.approx(float(of_path[QUERY][0, 0, 0]), rel=1e-5)}
        return
    names = {"all kernels": QUERY} if gate == "layer" else {"query": QUERY, "value": VALUE}
    assert list(found.layers) == list(names)
    for name, path in names.items():
        np.testing.assert_allclose(found.layers[name], of_path[path].mean(axis=(1, 2)), rtol=1e-5)
    assert found.single == {"pooler": pytest.approx(float(of_path[POOLER].mean()), rel=1e-5)}
