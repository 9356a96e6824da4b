"""A linear regression on three encoder weights, an embedding and a head, whose gradients NumPy gives."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import batch_of, setup_of

from agwm_jax.methods.interface import Context
from agwm_jax.models.model import Model
from agwm_jax.models.weights import Weight

WEIGHTS = {
    "embeddings.scale": Weight("embedding", ("vocab", "width"), 0),
    "encoder.query.kernel": Weight("kernel", ("width", "heads"), 1),
    "encoder.query.bias": Weight("bias", ("heads",), 1),
    "classifier.kernel": Weight("head", ("width", "classes"), 2),
}
PRETRAINED = {
    "embeddings.scale": jnp.array([[0.5]]),
    "encoder.query.kernel": jnp.array([[1.0], [-2.0]]),
    "encoder.query.bias": jnp.array([0.25]),
    "classifier.kernel": jnp.array([[1.5]]),
}
SLICES = {"embeddings.scale": [0], "encoder.query.kernel": [1, 2], "encoder.query.bias": [3], "classifier.kernel": [4]}

_rng = np.random.default_rng(11)
DATA = {"x": _rng.normal(size=(10, 5)).astype(np.float32), "y": _rng.normal(size=10).astype(np.float32)}


def flat(weights) -> np.ndarray:
    """All five numbers."""
    return np.concatenate([np.asarray(weights[path], np.float64).ravel() for path in SLICES])


def by_path(vector) -> dict[str, np.ndarray]:
    """The reverse of `flat`."""
    return {path: np.reshape(vector[rows], PRETRAINED[path].shape) for path, rows in SLICES.items()}


def loss(weights, batch):
    """Half the squared error of ``x . weights``, a mean over real rows."""
    stacked = jnp.concatenate([weights[path].ravel() for path in SLICES])
    each = 0.5 * (batch["x"] @ stacked - batch["y"]) ** 2
    return jnp.sum(each * batch["weight"]) / jnp.sum(batch["weight"])


def gradient(vector, rows) -> np.ndarray:
    """Of `loss` on the real ones of these rows, by NumPy."""
    rows = rows[rows >= 0]
    x, y = DATA["x"][rows].astype(np.float64), DATA["y"][rows].astype(np.float64)
    return x.T @ (x @ vector - y) / len(rows)


def setup(**options: Any):
    """With a constant rate of 0.01, no decay and no clip unless they are given."""
    steady = {"schedule": "constant", "warmup_fraction": 0.0, "weight_decay": 0.0, "gradient_clip": None}
    model = Model(embed=None, features=None, logits=None, weights=WEIGHTS)
    found = setup_of(model=model, num_labels=1, **{**steady, **options})
    return found._replace(loss=lambda *, reverse_only: loss, criterion=None, shapes=jax.eval_shape(lambda: PRETRAINED))


@partial(jax.jit, static_argnames=("start", "step"))
def _start_and_step(start, step, context, batch, key, index):
    state = start(context, jax.random.key(1))
    return step(state, context, {"train": batch}, key, index)


def take_step(phase, learnt, *, initial=None, step: int = 0, key=None):
    """One step of a phase from what was learnt before; the state after it, the info and the step's rows."""
    context = Context(PRETRAINED, learnt if initial is None else initial, learnt)
    rows = phase.plan["train"][step]
    key = jax.random.key(2) if key is None else key
    after, info = _start_and_step(phase.start, phase.step, context, batch(rows), key, jnp.int32(step))
    return after, info, rows


def batch(rows):
    """The rows of the data set."""
    return batch_of({name: jnp.asarray(column) for name, column in DATA.items()}, rows, jax.random.key(0))
