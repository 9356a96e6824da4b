"""Which weights should be fine-tuned: gates that training itself opens and shuts, under a price for open ones."""

import math
import zlib
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key
from pydantic import Field

from agwm_jax.core.types import Params, Scalar
from agwm_jax.errors import AgwmError
from agwm_jax.methods.agwm import OuterOptimizer
from agwm_jax.methods.interface import METHODS, Context, Hooks, Method, MethodSettings, Setup, Variables
from agwm_jax.methods.optimizers import by_collection
from agwm_jax.methods.training import TASK, finetune_plan, in_layers, replace_weights, task_weights, training_phase
from agwm_jax.models.model import Effective
from agwm_jax.models.weights import matching, of_role
from agwm_jax.section import Pattern

GATES = "gates"
"""The collection of log alpha, by path of the gated kernel: ``[*l, 1, 1]``, ``[*l, 1, d_out]``, ``[*l, 1, h]`` or
``[*l, h, 1]``."""

HEADS = "heads"
BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature and ends of the stretched interval, as in the paper."""

Group = Literal["matrix", "neuron", "head"]


class GateOptimizer(OuterOptimizer):
    learning_rate: float = Field(default=0.05, gt=0, description="peak learning rate, of log alpha")


@METHODS.register("learned_gates", cost="1", paper="arXiv 1712.01312")
class LearnedGates(MethodSettings):
    """Fine-tuning through ``z * W + (1 - z) * W0`` with a random gate z in [0, 1] for each group of weights, that is
    trained with W on the same batches, under a price for every weight that may leave W0.

    A gate multiplies the change W - W0, not the weight: where it is shut, z = 0, the group is the pretrained one, so
    what stays open tells which weights should be fine-tuned. In training ``z = clip(s (zeta - gamma) + gamma, 0, 1)``,
    ``s = sigmoid((log u - log(1 - u) + log alpha) / beta)``, u uniform and new at every step, beta 2/3, gamma -0.1,
    zeta 1.1; afterwards z is that of ``s = sigmoid(log alpha)``. The loss has ``+ penalty * share``, where share is the
    expected share of all gated weights whose gate is not 0: the mean over weights of ``sigmoid(log alpha - beta
    log(-gamma / zeta))``, so that the price does not depend on the size of the model or of the groups.

    Groups, of each kernel and layer: the matrix; a neuron, one column; a head, the columns of query, key and value and
    the rows of the attention's output that are one head's (kernels without heads are then gated as matrices). Biases,
    norms, embeddings and the head of the task have no gate and are trained. Gates held at 1 (``log_alpha: 30``,
    ``penalty: 0``): `vanilla` bit for bit.

    Cost 1 fb a step; memory of plain fine-tuning and of W0. To see where a task needs change; as other methods that
    learn gates on the training data itself, it has no defence against overfitting but the price. Source: Louizos et al.
    2018 (arXiv 1712.01312), equations 10 to 13, with W0 in place of 0.
    """

    name: Literal["learned_gates"] = Field(default="learned_gates", description="fine-tuning method")
    group: Group = Field(default="neuron", description="what has a gate: a matrix, a neuron (column) or a head")
    gated: Pattern | None = Field(
        default=None,
        description="regular expression for the paths of the gated kernels (whole path); null: all kernels",
    )
    penalty: float = Field(default=1e-2, ge=0, description="lambda, price of the expected share of open weights")
    log_alpha: float = Field(default=2.0, ge=-30, le=30, description="start of every gate; 2: open with 97 %")
    optimizer: GateOptimizer = Field(default=GateOptimizer(), description="optimiser of log alpha")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        gates = Gates(self, setup)
        plan = finetune_plan(setup)
        steps = len(plan["train"])

        def init(pretrained: Params, key: Key[Array, ""]) -> Variables:
            del key
            return {TASK: task_weights(setup, pretrained), GATES: gates.start(pretrained, self.log_alpha)}

        def penalty(context: Context, variables: Variables) -> Scalar:
            del context
            return self.penalty * gates.open_share(variables[TASK], variables[GATES])

        phase = training_phase(
            setup,
            plan=plan,
            tx=by_collection(
                {
                    TASK: setup.optimizer(setup.finetune.optimizer, num_steps=steps),
                    GATES: self.optimizer.build(num_steps=steps, weights=setup.model.weights),
                }
            ),
            trains=(TASK, GATES),
            forward=gates.forward,
            hooks=(Hooks(penalty=penalty),) if self.penalty > 0 else (),
        )
        phase = phase._replace(monitor=lambda state: gates.statistics(state.params[TASK], state.params[GATES]))
        return Method(init, ((phase,),), gates.merge)


class Gates:
    """The gates of one method for one model.

    Args:
        settings: which weights, and in which groups.
        setup: of the method.
    """

    def __init__(self, settings: LearnedGates, setup: Setup):
        """Raises AgwmError where `settings` do not fit the model."""
        self._weights, self._group = setup.model.weights, settings.group
        self.paths = _gated(settings.gated, setup)
        self._heads = _num_heads(setup, self.paths) if settings.group == "head" else 1

        def mixture(pretrained: Array, task: Array, gate: Array) -> Array:
            return (gate * task + (1 - gate) * pretrained).astype(task.dtype)

        self._mixture = mixture

    def start(self, pretrained: Params, log_alpha: float) -> dict[str, Array]:
        """All gates alike; an axis that they do not tell apart has size 1."""
        return {path: self._start(path, pretrained[path], log_alpha) for path in self.paths}

    def _start(self, path: str, weight: Array, log_alpha: float) -> Array:
        *stack, _, d_out = weight.shape
        rows, columns = 1, 1
        if self._group == "neuron":
            columns = d_out
        elif self._group == "head":
            rows, columns = (self._heads if axis == HEADS else 1 for axis in self._weights[path].axes[-2:])
        return jnp.full((*stack, rows, columns), log_alpha, jnp.promote_types(weight.dtype, jnp.float32))

    def forward(self, pretrained: Params, variables: Variables, key: Key[Array, ""]) -> Effective:
        """With gates drawn for this step, layer by layer within the model."""
        keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(b"gates")), len(self.paths))
        drawn = {path: draw(own, variables[GATES][path]) for path, own in zip(self.paths, keys, strict=True)}
        operands = self._operands(pretrained, variables[TASK], drawn)
        return {**replace_weights(pretrained, variables), **in_layers(self._weights, self._mixture, operands)}

    def merge(self, pretrained: Params, variables: Variables) -> Params:
        """`Method.merge`: with the gates as they stand without noise."""
        still = {path: settled(log_alpha) for path, log_alpha in variables[GATES].items()}
        mixed = {p: self._mixture(*x) for p, x in self._operands(pretrained, variables[TASK], still).items()}
        return {**replace_weights(pretrained, variables), **mixed}

    def _operands(self, pretrained: Params, task: Params, gates: Mapping[str, Array]) -> dict[str, tuple[Array, ...]]:
        return {path: (pretrained[path], task[path], spread(gates[path], task[path])) for path in self.paths}

    def open_share(self, task: Params, gates: Mapping[str, Array]) -> Scalar:
        """Expected share of all gated weights whose gate is not 0."""
        return self._average(task, {path: open_probability(gates[path]) for path in self.paths})

    def statistics(self, task: Params, gates: Mapping[str, Array]) -> dict[str, Scalar]:
        """Mean of the gates without noise over all gated weights, and the share of weights whose gate is 0."""
        still = {path: settled(gates[path]) for path in self.paths}
        shut = {path: (z == 0).astype(z.dtype) for path, z in still.items()}
        return {"gates_mean": self._average(task, still), "gates_shut": self._average(task, shut)}

    def _average(self, task: Params, values: Mapping[str, Array]) -> Scalar:
        """Over weights, of what is known of their groups; those of one kernel are of one size."""
        total = sum(task[path].size for path in self.paths)
        return jnp.sum(jnp.stack([task[path].size / total * jnp.mean(values[path]) for path in self.paths]))


def spread(gates: Float[Array, "*l gi go"], weight: Float[Array, "*l d_in d_out"]) -> Float[Array, "*l ei eo"]:
    """Gates of heads as one a column or row; others are broadcast as they are."""
    for axis in (-2, -1):
        count, size = gates.shape[axis], weight.shape[axis]
        gates = gates if count in (1, size) else jnp.repeat(gates, size // count, axis)
    return gates


def _num_heads(setup: Setup, paths: tuple[str, ...]) -> int:
    weights, heads = setup.model.weights, setup.model.num_heads
    found = [path for path in paths if HEADS in weights[path].axes[-2:]]
    if heads is None or not found:
        missing = "does not say how many attention heads it has" if heads is None else "gates no kernel with heads"
        raise AgwmError(f"method.group is head, and the model {missing}: choose matrix or neuron, or widen gated.")
    return heads


def _gated(pattern: str | None, setup: Setup) -> tuple[str, ...]:
    weights = setup.model.weights
    found = of_role(weights, "kernel")
    if pattern is not None:
        found = matching(weights, pattern, setting="method.gated", roles=("kernel",))
    paths = tuple(path for path in found if path not in setup.frozen)
    if not paths:
        raise AgwmError("learned_gates has no kernel to gate, for model.frozen holds all of them: freeze fewer.")
    return paths


def draw(key: Key[Array, ""], log_alpha: Float[Array, "..."]) -> Float[Array, "..."]:
    """A gate of the hard-concrete distribution for each log alpha."""
    tiny = jnp.finfo(log_alpha.dtype).eps
    u = jax.random.uniform(key, log_alpha.shape, log_alpha.dtype, tiny, 1 - tiny)
    return _stretched(jax.nn.sigmoid((jnp.log(u) - jnp.log1p(-u) + log_alpha) / BETA))


def settled(log_alpha: Float[Array, "..."]) -> Float[Array, "..."]:
    """The gate without noise."""
    return _stretched(jax.nn.sigmoid(log_alpha))


def open_probability(log_alpha: Float[Array, "..."]) -> Float[Array, "..."]:
    """That the drawn gate is not 0."""
    return jax.nn.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def _stretched(s: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1)
