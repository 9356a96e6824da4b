"""Predictions of a split: in its order, whatever lengths its batches are cut to, on one device or a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from agwm_jax.data.encode import Encoded
from agwm_jax.engine.sharding import make_placement, place
from agwm_jax.models.bert import BertClassifier, BertConfig
from agwm_jax.models.functional import functionalize
from agwm_jax.runs.finished import predict_logits, program_lengths

EXAMPLES, PADDED, BATCH = 27, 40, 4


def split(rng) -> Encoded:
    """Many short texts and a long one, in no order."""
    lengths = np.array([PADDED, 12, *rng.integers(2, 11, EXAMPLES - 3), 17])
    mask = np.arange(PADDED) < rng.permutation(lengths)[:, None]
    ids = np.where(mask, rng.integers(1, 50, mask.shape), 0)
    labels = np.zeros(EXAMPLES, np.int32)
    return Encoded(ids.astype(np.int32), (ids % 2).astype(np.int32), mask.astype(np.int32), labels)


@pytest.fixture
def model():
    """Apply that notes the shapes it is traced at, and parameters that make logits differ."""
    config = BertConfig(50, 16, 2, 2, 32, max_position_embeddings=PADDED)
    apply, params = functionalize(BertClassifier(config, num_labels=3, pooling="mean", rngs=nnx.Rngs(0)))
    shapes = []

    def noting(params, batch, **options):
        shapes.append(batch["input_ids"].shape)
        return apply(params, batch, **options)

    return noting, {path: 10 * x if path.endswith("kernel") else x for path, x in params.items()}, shapes


@pytest.mark.parametrize("mesh", [None, {"seed": 1, "data": 2, "model": 2}])
def test_logits_are_those_of_the_whole_split_in_its_order(model, mesh):
    apply, params, shapes = model
    encoded = split(np.random.default_rng(0))
    batch = {name: jnp.asarray(column) for name, column in encoded._asdict().items() if name != "labels"}
    whole = np.asarray(jax.jit(apply)(params, batch))
    assert np.ptp(whole, axis=0).min() > 0.1
    placement = None
    if mesh is not None:
        placement = make_placement(**mesh, fully_sharded=False)
        params = place(params, placement.of_tree(params, {path: x.shape for path, x in params.items()}))
    shapes.clear()
    logits = predict_logits(apply, params, encoded, batch_size=BATCH, placement=placement)
    np.testing.assert_allclose(logits, whole, rtol=0, atol=2e-6)
    # One shape a length, each traced once: 27 texts in 7 batches, of which one holds the longest texts.
    assert sorted(shapes) == [(BATCH, 16), (BATCH, 40)]


@pytest.mark.parametrize(("longest", "length"), [(15, 16), (16, 16), (17, 24), (24, 24), (25, 40)])
def test_a_batch_is_as_long_as_its_texts_need(model, longest, length):
    apply, params, shapes = model
    mask = (np.arange(PADDED) < np.array([[longest]] * BATCH)).astype(np.int32)
    encoded = Encoded(np.where(mask, 7, 0).astype(np.int32), 0 * mask, mask, np.zeros(BATCH, np.int32))
    batch = {name: column for name, column in encoded._asdict().items() if name != "labels"}
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
