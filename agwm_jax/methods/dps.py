"""Dynamic parameter selection: the sub-network that is trained is chosen anew in every cycle of steps."""

import math
import zlib
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key
from pydantic import Field

from agwm_jax.core.types import Params
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS, Batches, Context, Hooks, Info, Method, MethodSettings, Setup, Variables
from agwm_jax.methods.subnetwork import MASK, UNDER_THE_MASK, Mask, largest
from agwm_jax.methods.training import TASK, finetune_plan, replace_weights, start_at_pretrained, training_phase
from agwm_jax.models.weights import Weights, of_role

TARGET = "target"
"""What the masked-out entries stand at in a step of mix, by path; only within a step."""
_FEW = 50
"""Updates a stage; with fewer the authors' code does not discount entries that the noise kept often."""


class Cycle(NamedTuple):
    """State of the training."""

    training: Any
    """Of the `training_phase`."""
    mask: Mask
    """Of stage two, chosen at its first step."""
    counts: dict[str, Int[Array, "..."]]
    """Of mix: in how many steps of this stage one an entry was kept."""
    target: Params
    """Of mix: W at the start of this stage two."""


@METHODS.register("dps", cost="1", paper="arXiv 2211.01642")
class DPS(MethodSettings):
    """Fine-tuning in cycles of two stages: all kernels are trained, then those entries alone that had large gradients.

    Each stage has ``us = max(1, round(update_ratio * steps))`` updates. Stage one sums g^2 of every entry; stage two
    trains the share 1 - p of each kernel (of each layer) whose sums are largest. All other weights always train. Dense:
    stage one is plain; in stage two ``g <- g * mask``, before the clip and the moments, which still carry what stage
    one left in them. Mix: the forward pass takes ``(m W + (1 - m) T - p T) / (1 - p)``. In stage one T = W0 and m ~
    Bernoulli(1 - p), as in `mixout`, and the score is the mean of g^2 over the n steps that kept an entry, times
    ``exp(-n / us)`` where us is 50 or more; in stage two T is W at its start and m the mask.

    As the authors' code, but for dropout, which it switches off and which stays on here, the noise, drawn for every
    entry and not for every input, and the least us of 1. p = 0 is `vanilla` bit for bit.

    Cost 1 fb a step; memory of plain fine-tuning and of the sums, 5 bytes an entry of the kernels; for mix of W0, of
    two more copies and of the noisy weights as well. For few examples. Source: Zhang et al. 2022 (arXiv 2211.01642),
    algorithms 1 and 2.
    """

    name: Literal["dps"] = Field(default="dps", description="fine-tuning method")
    stages: Literal["dense", "mix"] = Field(default="dense", description="plain stages, or with noise towards W0")
    p: float = Field(default=0.3, ge=0, lt=1, description="share of each kernel that stage two does not train")
    update_ratio: float = Field(default=0.05, gt=0, le=0.5, description="updates of a stage, a share of all")

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        weights, mixes = setup.model.weights, self.stages == "mix"
        paths = [path for path in of_role(weights, "kernel") if path not in setup.frozen]
        if not paths:
            raise AgwmError("model.frozen holds all kernels, so dps has none to choose from: freeze fewer.")
        plan = finetune_plan(setup)
        steps = len(plan["train"])
        length = max(1, round(self.update_ratio * steps))
        tx = optax.chain(sums_of_squares(paths), setup.optimizer(setup.finetune.optimizer, num_steps=steps))

        def perturb(context: Context, variables: Variables, key: Key[Array, ""]) -> Variables:
            del context, key
            task, mask, target = variables[TASK], variables[MASK], variables[TARGET]
            mixed = {
                path: jnp.where(mask[path], (task[path] - self.p * target[path]) / (1 - self.p), target[path])
                for path in paths
            }
            return {**variables, TASK: {**task, **mixed}}

        hook = Hooks(perturb=perturb) if mixes else UNDER_THE_MASK
        phase = training_phase(setup, plan=plan, tx=tx, hooks=(hook,))

        def start(context: Context, key: Key[Array, ""]) -> Cycle:
            shapes = {path: context.learnt[TASK][path].shape for path in paths}
            mask = {path: jnp.ones(shape, bool) for path, shape in shapes.items()}
            counts = {path: jnp.zeros(shape, jnp.int32) for path, shape in shapes.items()} if mixes else {}
            target = {path: context.learnt[TASK][path] for path in paths} if mixes else {}
            return Cycle(phase.start(context, key), mask, counts, target)

        def choose(state: Cycle) -> tuple[Mask, Params]:
            scores, task = sums_in(state.training), state.training.params[TASK]
            if mixes:
                scores = {path: mean_score(x, state.counts[path], length) for path, x in scores.items()}
            mask = {path: keep_of_each(weights, path, x, self.p) for path, x in scores.items()}
            return mask, {path: task[path] for path in state.target}

        def draw(mask: Mask, key: Key[Array, ""]) -> Mask:
            shapes = {path: x.shape for path, x in mask.items()}
            return bernoulli(key, shapes, 1 - self.p) if mixes else jax.tree.map(jnp.ones_like, mask)

        def step(
            state: Cycle, context: Context, batches: Batches, key: Key[Array, ""], number: Int[Array, ""]
        ) -> tuple[Cycle, Info]:
            at = number % (2 * length)
            is_one = at < length
            sums, counts = jax.tree.map(
                lambda x: jnp.where(at == 0, jnp.zeros_like(x), x), (sums_in(state.training), state.counts)
            )
            state = state._replace(training=with_sums(state.training, sums), counts=counts)
            # `number` is one for all seeds that run side by side, so that only one branch is taken.
            chosen, target = jax.lax.cond(at == length, choose, lambda state: (state.mask, state.target), state)
            mask = jax.lax.cond(is_one, draw, lambda mask, key: mask, chosen, key)
            within = {**context.learnt, MASK: mask}
            if mixes:
                within[TARGET] = {path: jnp.where(is_one, context.pretrained[path], x) for path, x in target.items()}
            training, info = phase.step(state.training, context._replace(learnt=within), batches, key, number)
            counts = {path: count + mask[path].astype(count.dtype) for path, count in counts.items()}
            return Cycle(training, chosen, counts, target), info

        own = phase._replace(
            start=start, step=step, finish=lambda context, state: phase.finish(context, state.training)
        )
        return Method(start_at_pretrained(setup), ((own,),), replace_weights)


def sums_of_squares(paths: list[str]) -> optax.GradientTransformation:
    """Changes nothing; its state is the sum of the squared gradients of these task weights."""

    def init(params: Variables) -> Params:
        return {path: jnp.zeros_like(params[TASK][path]) for path in paths}

    def update(updates: Variables, state: Params, params: Any = None) -> tuple[Variables, Params]:
        del params
        return updates, {path: x + updates[TASK][path] ** 2 for path, x in state.items()}

    return optax.GradientTransformation(init, update)


def sums_in(training: Any) -> Params:
    """The state of `sums_of_squares`, first of the chain."""
    return training.opt_state[0]


def with_sums(training: Any, sums: Params) -> Any:
    """The training with other sums."""
    return training._replace(opt_state=(sums, *training.opt_state[1:]))


def mean_score(
    sums: Float[Array, "*l d_in d_out"], counts: Int[Array, "*l d_in d_out"], length: int
) -> Float[Array, "*l d_in d_out"]:
    """Of mix: the mean over the steps that kept an entry, discounted for those that kept it often."""
    mean = sums / jnp.maximum(counts, 1).astype(sums.dtype)
    return mean if length < _FEW else mean * jnp.exp(-counts.astype(sums.dtype) / length)


def keep_of_each(
    weights: Weights, path: str, scores: Float[Array, "*l d_in d_out"], p: float
) -> Bool[Array, "*l d_in d_out"]:
    """The share 1 - p of one weight's entries with the largest scores, of each layer by itself."""

    def one(scores: Float[Array, "..."]) -> Bool[Array, "..."]:
        return largest({path: scores}, math.ceil(round(scores.size * (1 - p), 6)))[path]

    return jax.vmap(one)(scores) if weights[path].is_stacked else one(scores)


def bernoulli(key: Key[Array, ""], shapes: dict[str, tuple[int, ...]], share: float) -> Mask:
    """Each entry True with that probability; a stream of its own within the step's key."""
    keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(b"dps")), len(shapes))
    return {
        path: jax.random.bernoulli(own, share, shape) for (path, shape), own in zip(shapes.items(), keys, strict=True)
    }
