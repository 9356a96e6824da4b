"""Every family in a bi-level search: two seeds side by side on a mesh of all axes learn what each learns alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from agwm_jax.engine.sharding import RULES, make_placement
from agwm_jax.methods.interface import Setup
from agwm_jax.methods.layers import from_the_top
from agwm_jax.methods.training import Finetune
from agwm_jax.models.family import FAMILIES, Options, build_model, fresh_params
from agwm_jax.models.model import Model
from agwm_jax.models.weights import decays, of_role
from tests.core.problems import ALL
from tests.engine.meshes import POSITIONS, VOCABULARY, Search, assert_equal, on_mesh, on_one_device

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": POSITIONS,
}
OWN = {
    "albert": {"embedding_size": 8, "hidden_dropout_prob": 0.1},
    "deberta_v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 6},
    "electra": {"embedding_size": 8},
    "llama": {"num_key_value_heads": 2, "attention_dropout": 0.1},
    "modernbert": {"local_attention": 6, "global_attn_every_n_layers": 2, "mlp_dropout": 0.1},
}
ESTIMATOR = ALL["unrolled"]
SAME_LAYERS = {"roberta", "distilbert", "electra"}
"""Whose layers are those of `bert`, under other names: one mesh for all of them."""


@functools.cache
def search(name):
    """All weights are trained, and all kernels mixed."""
    family = FAMILIES[name].value()
    names = getattr(family.read_config.__self__, "file_names", {})
    values = {names.get(key, key): value for key, value in SIZES.items()} | OWN.get(name, {})
    config = family.read_config(values)
    model, shapes = build_model(family, config, num_labels=2, options=Options(unroll=1))
    params = fresh_params(model.weights, shapes, seed=1, scale=0.1)
    pretrained = {path: jnp.asarray(x) for path, x in params.items()}
    return Search(model.apply, model.weights, pretrained, of_role(model.weights, "kernel"))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SAME_LAYERS])
def test_two_seeds_on_a_mesh_learn_what_each_learns_alone(name):
    alone = on_one_device(search(name), ESTIMATOR, lanes=2)
    together = on_mesh(search(name), ESTIMATOR, seed=2, data=2, model=2, fully_sharded=True)
    for found, expected in zip(together, alone, strict=True):
        assert_equal(found, expected)
    before = search(name).start(ESTIMATOR, 0)
    for path, gate in before.outer.items():
        assert not np.array_equal(gate.left, alone[0].state.outer[path].left), path


@pytest.mark.parametrize("name", FAMILIES)
def test_what_derives_from_the_weights_metadata(name):
    weights, shapes = search(name).weights, search(name).shapes
    mixed = search(name).mixed
    assert len(mixed) >= 6
    assert all(weights[path].is_matrix for path in mixed)
    assert not any(decays(weights)[path] for path, weight in weights.items() if weight.role in ("norm", "bias"))
    # Two by two: queries, keys, values and the feed-forward part lie in columns, what follows them in rows.
    placement = make_placement(seed=1, data=1, model=2, fully_sharded=False)
    cut = {path: placement.of_weight(weight.axes, shapes[path]) for path, weight in weights.items()}
    for part in ("query", "key", "value", "intermediate"):
        assert cut[f"encoder.layers.{part}.kernel"] == (None, None, "model"), part
    for part in ("attention_output", "output"):
        assert cut[f"encoder.layers.{part}.kernel"] == (None, "model", None), part
    assert all(name in RULES for path in mixed for name in weights[path].axes[-2:] if name not in ("embedding",))
    # Rates by depth: embeddings farthest from the top, the classifier at it, each layer one below the next.
    setup = Setup(
        model=Model(*[lambda: None] * 3, weights),
        loss=lambda: None,
        criterion=lambda: None,
        kind="classification",
        shapes={path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()},
        frozen=(),
        finetune=Finetune(),
        batch_size=8,
        num_examples=20,
        rng=np.random.default_rng,
    )
    depths = from_the_top(setup)
    layers = depths["encoder.layers.query.kernel"]
    assert layers.tolist() == list(range(len(layers), 0, -1))
    assert depths["embeddings.word.embedding"] == len(layers) + 1
    assert {int(depths[path]) for path in of_role(weights, "head")} == {0}
