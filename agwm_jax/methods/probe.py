"""Probe: a head on frozen features, fitted by scikit-learn; and the phase that methods share which fit a head so."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped
from pydantic import Field

from agwm_jax.core.types import Batch
from agwm_jax.data.plan import evaluation_plan
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import (
    METHODS,
    Batches,
    Context,
    Info,
    Method,
    MethodSettings,
    Phase,
    Setup,
    Variables,
)
from agwm_jax.methods.training import TASK, replace_weights
from agwm_jax.models.family import output_paths
from agwm_jax.models.model import Effective, Model
from agwm_jax.models.weights import Weights

STRENGTHS = np.logspace(-4, 4, 10)
"""C of the logistic regression, those that scikit-learn tries by itself; and 1/alpha of the ridge."""

_ABSENT = -100.0  # the logit of a class without an example: the solution has it at minus infinity


@METHODS.register("probe", cost="1/3", paper="arXiv 1610.01644")
class Probe(MethodSettings):
    """A linear head on the features of the pretrained model, which stays as it is; no gradient is taken.

    One pass over the training set, in order and without dropout, keeps what reaches the last layer of the classifier.
    Its weights are then the logistic regression ``min |W|^2 / 2 + C sum_i loss_i`` with C out of ten from 1e-4 to 1e4,
    chosen by log-loss over `folds` stratified folds (as many as the smallest class has examples, if that is fewer; C =
    1 where that is one), or for a regression the ridge, its strength chosen by leave-one-out. The bias is not
    penalised; examples count as `loss.class_weights` says, and labels are not smoothed. Layers of the classifier before
    the last are part of the features: fresh ones are random, so a family with a classifier of two layers probes a
    random projection.

    Cost 1/3 fb a step, and the fit on the host (seconds for a few hundred texts, a minute for five thousand); memory of
    the weights and of one vector a text. What fine-tuning has to beat, and often enough on a few dozen texts. Source:
    Alain and Bengio 2016 (arXiv 1610.01644); the solver is scikit-learn's.
    """

    open_to: ClassVar = frozenset()
    has_rate: ClassVar = False
    name: Literal["probe"] = Field(default="probe", description="fine-tuning method")
    folds: int = Field(default=5, ge=2, description="parts of the training set for the choice of C")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        return Method(lambda pretrained, key: {TASK: {}}, ((head_phase(setup, folds=self.folds),),), replace_weights)


class _Read(NamedTuple):
    features: Float[Array, "n d"]
    labels: Shaped[Array, " n"]
    weight: Float[Array, " n"]


def head_phase(setup: Setup, *, folds: int) -> Phase:
    """Fits the last layer of the classifier to the features of the weights that earlier phases left.

    Raises:
        AgwmError: that layer is frozen, or the training set has one class only.
    """
    kernel, bias = last_layer(setup.model.weights)
    frozen = [path for path in (kernel, bias) if path in setup.frozen]
    if frozen:
        raise AgwmError(f"model.frozen holds {', '.join(frozen)}, which this method fits: leave the classifier out.")
    if setup.kind == "classification" and setup.labels is not None and len(np.unique(setup.labels)) < 2:
        raise AgwmError("all training texts are of one class, so there is no head to fit: give two classes or more.")
    n, batch_size = setup.num_examples, setup.batch_size
    plan = evaluation_plan(n, batch_size=batch_size)
    inputs, outputs = setup.shapes[kernel].shape
    dtype = setup.shapes[kernel].dtype
    shapes = jax.ShapeDtypeStruct((inputs, outputs), dtype), jax.ShapeDtypeStruct((outputs,), dtype)
    solve = partial(fit_head, kind=setup.kind, num_classes=outputs, folds=folds)

    def start(context: Context, key: Key[Array, ""]) -> _Read:
        del context, key
        label = jnp.float32 if setup.kind == "regression" else jnp.int32
        return _Read(jnp.zeros((plan.size, inputs), dtype), jnp.zeros(plan.size, label), jnp.zeros(plan.size))

    def step(state: _Read, context: Context, batches: Batches, key, step) -> tuple[_Read, Info]:
        del key
        batch = batches["train"]
        found = head_inputs(setup.model, replace_weights(context.pretrained, context.learnt), batch)
        read = _Read(found, batch["labels"], batch["weight"])

        def write(all_, own):
            return jax.lax.dynamic_update_slice_in_dim(all_, own.astype(all_.dtype), step * batch_size, 0)

        return jax.tree.map(write, state, read), {}

    def finish(context: Context, state: _Read) -> Variables:
        real = jax.tree.map(lambda x: x[:n], state)
        found = jax.pure_callback(_as(solve, dtype), shapes, *real, vmap_method="sequential")
        return {TASK: {**context.learnt[TASK], **dict(zip((kernel, bias), found, strict=True))}}

    return Phase("features", {"train": plan}, start, step, finish)


def last_layer(weights: Weights) -> tuple[str, str]:
    """Paths of kernel and bias of the classifier's last layer."""
    kernel, bias = sorted(output_paths(weights), key=lambda path: not weights[path].is_matrix)
    return kernel, bias


def head_inputs(model: Model, params: Effective, batch: Batch) -> Float[Array, "b d"]:
    """What reaches the last layer of the classifier, without dropout: the logits with the identity in its place."""
    kernel, bias = last_layer(model.weights)
    width, dtype = params[kernel].shape[0], params[kernel].dtype
    through = {**params, kernel: jnp.eye(width, dtype=dtype), bias: jnp.zeros(width, dtype)}
    features = model.features(params, model.embed(params, batch), batch, reverse_only=True)
    with jax.default_matmul_precision("highest"):  # else a GPU rounds them
        return model.logits(through, features)


def fit_head(
    features: Float[np.ndarray, "n d"],
    labels: Shaped[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"],
    *,
    kind: str,
    num_classes: int,
    folds: int,
) -> tuple[Float[np.ndarray, "d c"], Float[np.ndarray, " c"]]:
    """Kernel and bias of the logistic regression, or of the ridge, in float64; NumPy alone, and deterministic.

    Of two classes scikit-learn gives one score s: the logits are -s/2 and s/2, which have its probabilities.
    """
    from sklearn.linear_model import RidgeCV

    features = np.asarray(features, np.float64)
    if not np.isfinite(features).all():  # of a member that diverged, beside others that go on
        return np.full((features.shape[1], num_classes), np.nan), np.full(num_classes, np.nan)
    if kind == "regression":
        ridge = RidgeCV(alphas=1 / STRENGTHS).fit(features, np.asarray(labels, np.float64))
        return ridge.coef_[:, None], np.atleast_1d(ridge.intercept_)
    found = _logistic(features, labels, None if (weight == 1).all() else np.asarray(weight, np.float64), folds)
    coefficients, intercepts = found.coef_, found.intercept_
    if len(found.classes_) == 2:
        coefficients, intercepts = (np.concatenate([-x / 2, x / 2]) for x in (coefficients, intercepts))
    kernel, bias = np.zeros((features.shape[1], num_classes)), np.full(num_classes, _ABSENT)
    kernel[:, found.classes_], bias[found.classes_] = coefficients.T, intercepts
    return kernel, bias


def _logistic(
    features: Float[np.ndarray, "n d"],
    labels: Shaped[np.ndarray, " n"],
    weight: Float[np.ndarray, " n"] | None,
    folds: int,
):
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, LogisticRegressionCV

    smallest = int(np.unique(labels, return_counts=True)[1].min())
    model = (
        LogisticRegression(C=1.0, max_iter=1000)
        if smallest < 2
        else LogisticRegressionCV(
            Cs=STRENGTHS,
            cv=min(folds, smallest),
            l1_ratios=(0.0,),
            scoring="neg_log_loss",
            use_legacy_attributes=False,
            max_iter=1000,
        )
    )
    with warnings.catch_warnings():  # the weakest strengths, which are hardly ever chosen, may take longer
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, labels, sample_weight=weight)


def _as(solve: Callable[..., tuple[np.ndarray, ...]], dtype) -> Callable[..., tuple[np.ndarray, ...]]:
    """The solution in the dtype of the weights, out of whatever arrays the callback is handed."""

    def solved(*arrays):
        return tuple(np.asarray(x, dtype) for x in solve(*map(np.asarray, arrays)))

    return solved
