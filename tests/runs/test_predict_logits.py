"""Predictions of a split: in its order, whatever lengths its batches are cut to, on one device or a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SIZES

from agwm_jax.engine.sharding import make_placement, place
from agwm_jax.models.family import FAMILIES, build_model, fresh_params
from agwm_jax.runs.fitted import predict_logits, program_lengths

EXAMPLES, PADDED, BATCH = 27, 40, 4


def split(rng) -> dict[str, np.ndarray]:
    """Many short texts and a long one, in no order."""
    lengths = np.array([PADDED, 12, *rng.integers(2, 11, EXAMPLES - 3), 17])
    mask = np.arange(PADDED) < rng.permutation(lengths)[:, None]
    ids = np.where(mask, rng.integers(1, 50, mask.shape), 0)
    columns = {"input_ids": ids, "token_type_ids": ids % 2, "attention_mask": mask, "labels": np.zeros(EXAMPLES)}
    return {name: column.astype(np.int32) for name, column in columns.items()}


@pytest.fixture
def model():
    """Apply that notes the shapes it is traced at, and parameters that make logits differ."""
    family = FAMILIES["bert"].value()
    config = family.read_config({"model_type": "bert", "vocab_size": 50, **SIZES})
    model, weight_shapes = build_model(family, config, num_labels=3, pooling="mean")
    params = fresh_params(model.weights, weight_shapes, seed=0, scale=config.initializer_range)
    shapes = []

    def noting(params, batch, **options):
        shapes.append(batch["input_ids"].shape)
        return model.apply(params, batch, **options)

    return noting, params, shapes, model.weights


@pytest.mark.parametrize("mesh", [None, {"seed": 1, "data": 2, "model": 2}])
def test_logits_are_those_of_the_whole_split_in_its_order(model, mesh):
    apply, params, shapes, weights = model
    encoded = split(np.random.default_rng(0))
    batch = {name: jnp.asarray(column) for name, column in encoded.items() if name != "labels"}
    whole = np.asarray(jax.jit(apply)(params, batch))
    assert np.ptp(whole, axis=0).min() > 0.1
    placement = None
    if mesh is not None:
        placement = make_placement(**mesh, fully_sharded=False)
        params = place(params, placement.of_tree(params, weights, {path: x.shape for path, x in params.items()}))
    shapes.clear()
    logits = predict_logits(apply, params, encoded, batch_size=BATCH, placement=placement)
    np.testing.assert_allclose(logits, whole, rtol=0, atol=2e-6)
    # One shape a length, each traced once: 27 texts in 7 batches, of which one holds the longest texts.
    assert sorted(shapes) == [(BATCH, 16), (BATCH, 40)]


@pytest.mark.parametrize(("longest", "length"), [(15, 16), (16, 16), (17, 24), (24, 24), (25, 40)])
def test_a_batch_is_as_long_as_its_texts_need(model, longest, length):
    apply, params, shapes, _ = model
    mask = (np.arange(PADDED) < np.array([[longest]] * BATCH)).astype(np.int32)
    encoded = {"input_ids": 7 * mask, "token_type_ids": 0 * mask, "attention_mask": mask, "labels": mask[:, 0]}
    batch = {name: column for name, column in encoded.items() if name != "labels"}
    whole = jax.jit(apply)(params, batch)
    logits = predict_logits(apply, params, encoded, batch_size=BATCH)
    assert shapes == [(BATCH, PADDED), (BATCH, length)]
    np.testing.assert_allclose(logits, whole, rtol=0, atol=2e-6)


def test_the_lengths_are_few(monkeypatch):
    assert [sorted(program_lengths(n)) for n in (128, 100, 41, 8, 7)] == [
        [32, 64, 128],
        [32, 56, 100],
        [16, 24, 41],
        [8],
        [7],
    ]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert program_lengths(128) == {128}
