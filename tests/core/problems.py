"""The problem zoo: bi-level problems whose hypergradients are known without the library, shared by the tests."""

import inspect
import itertools
from typing import NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agwm_jax import (
    ESTIMATORS,
    Composite,
    InnerState,
    LowRank,
    Partition,
    Problem,
    hypergrad,
    hypergradient,
    inner_steps,
    linear_solve,
    mix,
    mixup_problem,
    partition,
)
from agwm_jax.registry import Registry

NO_BATCH = jnp.zeros(())


def registered(registry: Registry) -> dict:
    """Everything that is registered as it is by default, with each thing that it can be made with."""
    found = {}
    for entry in registry.entries():
        hints = get_type_hints(entry.value, include_extras=True)
        choices = {}
        for parameter in inspect.signature(entry.value).parameters:
            for note in getattr(hints[parameter], "__metadata__", ()):
                if isinstance(note, Registry):
                    choices[parameter] = registered(note)
        for names in itertools.product(*choices.values()):
            chosen = {parameter: choices[parameter][name] for parameter, name in zip(choices, names, strict=True)}
            found[" ".join((entry.name, *names))] = entry.value(**chosen)
    return found


def neumann(num_terms, step_size, **options):
    return hypergrad.implicit(linear_solve.neumann(num_terms=num_terms, step_size=step_size), **options)


def dense():
    return hypergrad.implicit(linear_solve.dense())


def conjugate_gradient(num_steps, **options):
    return hypergrad.implicit(linear_solve.conjugate_gradient(num_steps=num_steps, **options))


DIFFERENCES = {
    "unrolled finite_difference": hypergrad.unrolled(hvp="finite_difference"),
    "neumann finite_difference": neumann(3, 0.1, hvp="finite_difference"),
    "neumann gauss_newton finite_difference": neumann(3, 0.1, hvp="finite_difference", curvature="gauss_newton"),
    "finite_difference": hypergrad.finite_difference(),
    "finite_difference preconditioned": hypergrad.finite_difference(precondition="adjoint"),
    "penalty": hypergrad.penalty(),
    "penalty growing": hypergrad.penalty(growth=1.0),
}
"""Estimators that subtract gradients from each other."""

ALL = {
    **registered(ESTIMATORS),
    **DIFFERENCES,
    "unrolled last": hypergrad.unrolled(num_steps=1),
    "unrolled jvp": hypergrad.unrolled(hvp="jvp"),
    "unrolled few states": hypergrad.unrolled(states=2),
    "neumann": neumann(3, 0.1),
    "neumann gauss_newton": neumann(3, 0.1, curvature="gauss_newton"),
    "neumann resample": neumann(3, 0.1, hvp="jvp", resample=True),
    "conjugate_gradient warm": hypergrad.implicit(
        linear_solve.conjugate_gradient(num_steps=2, damping=0.1, warm_start=True), curvature="gauss_newton"
    ),
}
"""Every estimator with every solver that is registered, and options of ours: what the conformance suite runs over."""


def estimates_at(
    problem, estimator, inner, outer, *, calls, tx=None, num_steps=1, inner_batches=None, outer_batch=NO_BATCH
):
    """As many estimates, each from `inner`, the estimator's state carried from one to the next."""
    inner_batches = jnp.zeros((num_steps,)) if inner_batches is None else inner_batches
    start = inner if isinstance(inner, InnerState) else InnerState(inner, () if tx is None else tx.init(inner))

    @jax.jit
    def run(start, outer, state):
        return hypergradient(problem, estimator, start, outer, inner_batches, outer_batch, inner_tx=tx, state=state)

    estimates, state = [], estimator.init(start, outer)
    for _ in range(calls):
        estimates.append(run(start, outer, state))
        state = estimates[-1].state
    return estimates


def estimate_at(problem, estimator, inner, outer, **options):
    """The estimate from `inner`; without `tx` that is the solution."""
    return estimates_at(problem, estimator, inner, outer, calls=1, **options)[0]


TRANSFORMS = {
    "adamw, clipped, on a schedule": optax.chain(
        optax.clip_by_global_norm(0.3),
        optax.adamw(optax.linear_schedule(0.1, 0.0, 20), weight_decay=0.1),
    ),
    "momentum": optax.sgd(0.05, momentum=0.9),
}
"""Inner optimisers whose update is not a multiple of the gradient."""


def warm_state(problem, tx, outer):
    """The inner state after some steps at another outer variable, away from the optimum."""
    start = jnp.array([0.5, -1.0, 2.0])
    return inner_steps(
        problem.inner_loss, tx, InnerState(start, tx.init(start)), jnp.asarray(outer) + 0.3, jnp.zeros(5)
    )[0]


def central_difference(fn, x, radius=1e-5):
    """The gradient of a scalar NumPy function, an entry at a time."""
    grad = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[index] += sign * radius
            ends.append(fn(moved))
        grad[index] = (ends[0] - ends[1]) / (2 * radius)
    return grad


def darts_toy() -> Problem:
    """The toy of the DARTS paper: optimum (1, 1); the direct term alone leads to (2, 2)."""
    return Problem(lambda w, a, _: (w - a) ** 2, lambda w, a, _: a * w - 2 * a + 1)


class Ridge(NamedTuple):
    """Ridge regression whose penalty is the outer variable; the outer loss is quadratic in both variables."""

    problem: Problem
    hessian: np.ndarray
    moment: np.ndarray
    validation: tuple[np.ndarray, np.ndarray]
    penalty: float = np.float64(0.3)  # no Python float, which would be a weak type

    def solution(self):
        """The inner optimum."""
        return np.linalg.solve(self.hessian, self.moment)

    def outer_gradient(self, w):
        """``d_w g``."""
        x, y = self.validation
        return x.T @ (x @ w - y) / len(y)

    def hypergradient(self, w, x):
        """``d_o g - J x`` with J = d2_ow f = w, for an approximate solution x of ``H x = d_w g``."""
        return 0.2 * self.penalty - w @ x

    def exact(self, w):
        return self.hypergradient(w, np.linalg.solve(self.hessian, self.outer_gradient(w)))

    def descend(self, w, step_size, num_steps=1):
        """Inner gradient steps."""
        for _ in range(num_steps):
            w = w - step_size * (self.hessian @ w - self.moment)
        return w


def ridge(seed=0, n=12, d=4) -> Ridge:
    rng = np.random.default_rng(seed)
    x, x_val = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    y, y_val = rng.normal(size=n), rng.normal(size=n)

    # The model is linear in w, so that its Gauss-Newton matrix is the Hessian.
    inner = Composite(
        lambda w, penalty, _: (jnp.asarray(x) @ w, jnp.sqrt(penalty) * w),
        lambda z, _: 0.5 * jnp.mean((z[0] - jnp.asarray(y)) ** 2) + 0.5 * jnp.sum(z[1] ** 2),
    )

    def outer(w, penalty, _):
        return 0.5 * jnp.mean((jnp.asarray(x_val) @ w - jnp.asarray(y_val)) ** 2) + 0.1 * penalty**2

    hessian = x.T @ x / n + Ridge._field_defaults["penalty"] * np.eye(d)
    return Ridge(Problem(inner, outer), hessian, x.T @ y / n, (x_val, y_val))


class Quadratic(NamedTuple):
    """f = 0.5 (w - o)' diag(h) (w - o), g = v . w: so d_w g = v everywhere and J = -diag(h)."""

    problem: Problem
    h: np.ndarray
    v: np.ndarray


def diagonal_quadratic(h=(0.2, 1.0, 3.0), v=(1.0, -2.0, 0.5)) -> Quadratic:
    h, v = np.array(h), np.array(v)

    def inner(w, o, _):
        return 0.5 * jnp.sum(jnp.asarray(h) * (w - o) ** 2)

    return Quadratic(Problem(inner, lambda w, o, _: jnp.sum(jnp.asarray(v) * w)), h, v)


class Logistic(NamedTuple):
    """Logistic regression with a penalty exp(o_j) on feature j: smooth, not quadratic; o is the outer variable."""

    problem: Problem
    log_penalty: np.ndarray
    optimum: np.ndarray
    hessian: np.ndarray
    solution: np.ndarray  # of H x = d_w g
    hypergradient: np.ndarray


def logistic(seed=0, n=20, log_penalty=(-1.0, -0.5, 0.2)) -> Logistic:
    """With the inner optimum by Newton's method, and there the Hessian and the exact hypergradient."""
    rng, log_penalty = np.random.default_rng(seed), np.array(log_penalty)
    d = len(log_penalty)
    x, y = rng.normal(size=(n, d)), rng.integers(0, 2, n) * 2.0 - 1
    x_val, y_val = rng.normal(size=(n, d)), rng.integers(0, 2, n) * 2.0 - 1

    # Linear in w: the Gauss-Newton matrix is the Hessian.
    inner = Composite(
        lambda w, o, _: (jnp.asarray(x) @ w, jnp.exp(o / 2) * w),
        lambda z, _: jnp.mean(jax.nn.softplus(-jnp.asarray(y) * z[0])) + 0.5 * jnp.sum(z[1] ** 2),
    )

    def outer(w, o, _):
        return jnp.mean(jax.nn.softplus(-jnp.asarray(y_val) * (jnp.asarray(x_val) @ w))) + 0.01 * jnp.sum(o**2)

    w, penalty = np.zeros(d), np.exp(log_penalty)
    for _ in range(20):
        s = 1 / (1 + np.exp(y * (x @ w)))
        hessian = (x * (s * (1 - s))[:, None]).T @ x / n + np.diag(penalty)
        w = w - np.linalg.solve(hessian, -x.T @ (y * s) / n + penalty * w)
    v = -x_val.T @ (y_val / (1 + np.exp(y_val * (x_val @ w)))) / n
    solution = np.linalg.solve(hessian, v)
    exact = 0.02 * log_penalty - penalty * w * solution
    return Logistic(Problem(inner, outer), log_penalty, w, hessian, solution, exact)


class Tanh(NamedTuple):
    """f = |tanh(X w) - y|^2 / 2n + o/2 |w|^2, g = |w - 1|^2 / 2: not linear in w, its Hessian at w is indefinite."""

    problem: Problem
    x: np.ndarray
    y: np.ndarray
    w: np.ndarray
    penalty: float = 0.05

    def gauss_newton(self):
        """J'LJ at w: J = (1 - z^2) X and L = I/n for the prediction z, J = sqrt(o) I and L = I for the penalty."""
        jacobian = (1 - np.tanh(self.x @ self.w) ** 2)[:, None] * self.x
        return jacobian.T @ jacobian / len(self.y) + self.penalty * np.eye(len(self.w))

    def hessian(self):
        z = np.tanh(self.x @ self.w)
        bend = (z - self.y) * -2 * z * (1 - z**2)
        return self.gauss_newton() + self.x.T @ (bend[:, None] * self.x) / len(self.y)


def tanh_regression(seed=0, n=12, d=5) -> Tanh:
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(n, d)), rng.normal(size=d)
    y = -np.sign(x @ w)  # every prediction is on the wrong side, where the loss is curved downwards
    inner = Composite(
        lambda w, o, _: (jnp.tanh(jnp.asarray(x) @ w), jnp.sqrt(o) * w),
        lambda z, _: 0.5 * jnp.mean((z[0] - jnp.asarray(y)) ** 2) + 0.5 * jnp.sum(z[1] ** 2),
    )
    return Tanh(Problem(inner, lambda w, o, _: 0.5 * jnp.sum((w - 1) ** 2)), x, y, w)


class MixedLinear(NamedTuple):
    """Weight mixup of a linear model with squared loss, whose inner problem has a closed-form solution."""

    problem: Problem
    pretrained: np.ndarray
    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    anchor: float

    def solve(self, a):
        """argmin_W, a column of W at a time: with D = W - W0, (A X'X A / n + anchor I) D = A X'(Y - X W0) / n."""
        x, y = self.train
        change = np.zeros_like(self.pretrained)
        for j in range(a.shape[1]):
            scaled = x * a[:, j]
            matrix = scaled.T @ scaled / len(x) + self.anchor * np.eye(a.shape[0])
            change[:, j] = np.linalg.solve(matrix, scaled.T @ (y - x @ self.pretrained)[:, j] / len(x))
        return self.pretrained + change

    def solved_outer_loss(self, a):
        x, y = self.validation
        effective = self.pretrained + a * (self.solve(a) - self.pretrained)
        return 0.5 * np.sum((x @ effective - y) ** 2) / len(x)


def mixed_linear(anchor: float, seed=0, n=24, shape=(4, 2)) -> MixedLinear:
    rng = np.random.default_rng(seed)
    pretrained = rng.normal(size=shape)
    sets = []
    for _ in range(2):
        x = rng.normal(size=(n, shape[0]))
        sets.append((x, x @ (pretrained + 0.5 * rng.normal(size=shape)) + 0.3 * rng.normal(size=(n, shape[1]))))

    loss = Composite(
        lambda params, batch: batch[0] @ params["w"],
        lambda z, batch: 0.5 * jnp.sum((z - batch[1]) ** 2) / z.shape[0],
    )
    problem = mixup_problem(loss, partition({"w": jnp.asarray(pretrained)}, mixed="w"), anchor=anchor)
    return MixedLinear(problem, pretrained, *sets, anchor)


def random_gate(rank, shape=(4, 2), seed=1):
    """An alpha well inside (0, 1), in NumPy."""
    rng = np.random.default_rng(seed)
    if rank == "full":
        return rng.uniform(0.4, 0.9, shape)
    return LowRank(rng.uniform(0.6, 0.95, (shape[0], rank)), rng.uniform(0.6, 0.95, (rank, shape[1])))


class Network(NamedTuple):
    """A small classifier with dropout by a key in the batch, on random data: a stand-in for the real model."""

    params: dict
    partition: Partition

    def logits(self, params, batch):
        x = batch["x"].astype(params["first.kernel"].dtype)
        hidden = jnp.tanh(x @ params["first.kernel"] + params["first.bias"][None])
        return jnp.where(self.mask(batch), hidden / 0.8, 0) @ params["second.kernel"]

    def bfloat16_logits(self, params, batch):
        return self.logits(jax.tree.map(lambda w: w.astype(jnp.bfloat16), params), batch)

    def mask(self, batch):
        """Drawn by the batch's key, or given with the batch."""
        return batch["keep"] if "keep" in batch else jax.random.bernoulli(batch["key"], 0.8, (len(batch["x"]), 6))

    def cross_entropy(self, logits, batch):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), batch["y"]))

    def loss(self, params, batch):
        return self.cross_entropy(self.logits(params, batch), batch)

    def problem(self, weights, *, compute="float32", anchor=0.1):
        logits = {"float32": self.logits, "bfloat16": self.bfloat16_logits}[compute]
        loss = Composite(logits, self.cross_entropy)
        return mixup_problem(loss, partition(weights, mixed=r".*kernel"), anchor=anchor)

    def batches(self, seed, *lead, b=8):
        """A batch, or with `lead` a stack of them."""
        rng = np.random.default_rng(seed)
        key = jax.random.key(seed)
        return {
            "x": jnp.asarray(rng.normal(size=(*lead, b, 4)), jnp.float32),
            "y": jnp.asarray(rng.integers(0, 3, (*lead, b)), jnp.int32),
            "key": jax.random.split(key, lead) if lead else key,
        }


def network(seed=0) -> Network:
    rng = np.random.default_rng(seed)
    params = {
        "first.kernel": jnp.asarray(rng.normal(size=(4, 6)) / 2, jnp.float32),
        "first.bias": jnp.zeros(6),
        "second.kernel": jnp.asarray(rng.normal(size=(6, 3)) / 2, jnp.float32),
    }
    return Network(params, partition(params, mixed=r".*kernel"))


def effective_weight(w0, w, alpha, **kwargs):
    """`mix` on a single weight."""
    return mix(partition({"w": w0}, mixed="w"), {"w": w}, {"w": alpha}, **kwargs)["w"]
