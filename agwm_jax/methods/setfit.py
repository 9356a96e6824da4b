"""SetFit: features are trained on pairs of texts, then a head is fitted to them."""

from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped
from pydantic import Field

from agwm_jax.core.types import Batch, Scalar
from agwm_jax.data.plan import epoch_plan
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS, Method, MethodSettings, Plan, Setup
from agwm_jax.methods.probe import head_phase
from agwm_jax.methods.training import Objective, replace_weights, start_at_pretrained, training_phase
from agwm_jax.models.family import head_paths
from agwm_jax.models.model import Effective


@METHODS.register("setfit", cost="contrast: 2; features: 1/3", paper="arXiv 2209.11055")
class SetFit(MethodSettings):
    """Contrastive fine-tuning: ``(cos(f(a), f(b)) - t)^2`` over pairs of training texts, then the head of `probe`.

    Every text is paired with `num_pairs` others: half of them of its own class, t = 1, half of other classes, t = 0.
    For a regression the others are any, and t is how close the scores are: ``1 - |y_a - y_b| / (max - min)``. One pass
    over all pairs, `batch_size` pairs a step, trains all but the classifier on the pooled features f, by the optimiser
    of `finetune` with a learning rate of its own; `finetune.epochs` is not read. 0 pairs are `probe` bit for bit.

    Cost 2 fb a step (two texts a pair) over ``n * num_pairs / batch_size`` steps, then 1/3 fb a step of one pass;
    memory of plain fine-tuning with twice the activations. For a few dozen texts and a sentence encoder. Source:
    Tunstall et al. 2022 (arXiv 2209.11055), section 3.
    """

    open_to: ClassVar = frozenset({"gradient", "weights", "start"})
    name: Literal["setfit"] = Field(default="setfit", description="fine-tuning method")
    num_pairs: int = Field(default=20, ge=0, multiple_of=2, description="pairs a text, half of them of its own class")
    learning_rate: float = Field(default=2e-5, gt=0, description="peak learning rate, in place of finetune.optimizer's")
    folds: int = Field(default=5, ge=2, description="parts of the training set for the choice of the head's C")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        head = head_phase(setup, folds=self.folds)
        # The classifier has no gradient, and must not decay either.
        encoder = setup._replace(frozen=tuple({*setup.frozen, *head_paths(setup.model.weights)}))
        if not self.num_pairs:
            return Method(start_at_pretrained(encoder), ((head,),), replace_weights)
        plan = pair_plan(setup, self.num_pairs)
        optimizer = setup.finetune.optimizer.model_copy(update={"learning_rate": self.learning_rate})
        contrast = training_phase(
            encoder,
            name="contrast",
            plan=plan,
            batch="pair",
            tx=encoder.optimizer(optimizer, num_steps=len(plan["pair"])),
            objective=contrastive_loss(setup),
        )
        return Method(start_at_pretrained(encoder), ((contrast,), (head,)), replace_weights)


def contrastive_loss(setup: Setup) -> Objective:
    """``objective(params, batch)``: the second half of a batch's texts are the partners of the first, in order."""
    model, is_score = setup.model, setup.kind == "regression"
    spread = 1.0 if setup.labels is None or not is_score else float(np.ptp(setup.labels))

    def objective(params: Effective, batch: Batch) -> Scalar:
        embedded = model.embed(params, batch)
        features = model.features(params, embedded, batch, key=batch.get("key"), reverse_only=True)
        labels = jnp.split(batch["labels"], 2)
        target = 1 - jnp.abs(labels[0] - labels[1]) / spread if is_score else (labels[0] == labels[1]) * 1.0
        weight = jnp.split(batch["weight"] > 0, 2)[0].astype(jnp.float32)  # pairs have no class: padding alone counts
        return jnp.sum(weight * (cosine(*jnp.split(features, 2)) - target) ** 2) / jnp.sum(weight)

    return objective


def cosine(a: Float[Array, "b d"], b: Float[Array, "b d"]) -> Float[Array, " b"]:
    """Of two vectors a row; 0 where one of them is 0."""
    squares = jnp.sum(a * a, 1) * jnp.sum(b * b, 1)
    return jnp.sum(a * b, 1) / jnp.sqrt(jnp.maximum(squares, jnp.finfo(squares.dtype).tiny))


def pair_plan(setup: Setup, num_pairs: int) -> Plan:
    """``{"pair": [steps, 2 b]}``: one pass over all pairs in random order; b rows, then their partners.

    Raises:
        AgwmError: a class has one example, or there is but one class.
    """
    b = setup.batch_size
    if setup.labels is None:  # nothing will be trained
        return {"pair": np.zeros((1, 2 * b), np.int32)}
    rng = setup.rng("pairs")
    pairs = draw_pairs(setup.labels, kind=setup.kind, num_pairs=num_pairs, rng=rng)
    places = epoch_plan(np.arange(len(pairs)), batch_size=b, epochs=1, rng=rng)
    rows = np.where(places[..., None] < 0, -1, pairs[places])
    return {"pair": np.concatenate([rows[..., 0], rows[..., 1]], axis=1).astype(np.int32)}


def draw_pairs(
    labels: Shaped[np.ndarray, " n"], *, kind: str, num_pairs: int, rng: np.random.Generator
) -> Int[np.ndarray, "pairs 2"]:
    """Every text with `num_pairs` others, as rows of the training set.

    Raises:
        AgwmError: see `pair_plan`.
    """
    labels = np.asarray(labels)
    if kind == "regression":
        return _with_others(np.arange(len(labels)), num_pairs, rng)
    classes, counts = np.unique(labels, return_counts=True)
    lonely = classes[counts == 1]
    if len(lonely):
        raise AgwmError(
            f"setfit pairs texts of one class, and class number {lonely[0]} (from 0) has one training text alone: give "
            "it two or more, leave the class out, or set method.num_pairs 0."
        )
    if len(classes) < 2:
        raise AgwmError("setfit pairs texts of different classes, and all training texts are of one: give more.")
    found = []
    for one in classes:
        own, others = np.flatnonzero(labels == one), np.flatnonzero(labels != one)
        found.append(_with_others(own, num_pairs // 2, rng))
        partners = rng.choice(others, (len(own), num_pairs // 2))
        found.append(np.stack([np.repeat(own, num_pairs // 2), partners.ravel()], axis=1))
    return np.concatenate(found)


def _with_others(rows: Int[np.ndarray, " m"], count: int, rng: np.random.Generator) -> Int[np.ndarray, "pairs 2"]:
    """Each of the rows with `count` of the other rows, drawn with replacement."""
    places = np.arange(len(rows))[:, None]
    others = rng.integers(0, len(rows) - 1, (len(rows), count))
    others += others >= places  # never itself
    return np.stack([np.repeat(rows, count), rows[others].ravel()], axis=1)
