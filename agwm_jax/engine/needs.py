"""Which leaves of the context the functions of a method read, stage by stage: what none reads is held nowhere."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from agwm_jax.engine.batches import step_batches
from agwm_jax.engine.liveness import Dependence, dependence
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import Context, Method, Phase, Stage, State, Variables

_INTEGER = jax.ShapeDtypeStruct((), jnp.int32)
Shaped = Mapping[str, Any]
PRETRAINED, INITIAL = "pretrained", "initial"

Key = str
"""Names an array that some context holds, by what made it: ``pretrained/<path>``, ``initial/<path>`` or
``<stage>/<path>``. A leaf that is another one as it came (task weights that start as the pretrained ones) has its
key."""


class StageNeeds(NamedTuple):
    """What one stage reads."""

    sources: Context
    """A key in place of every leaf."""
    start: frozenset[Key]
    step: frozenset[Key]
    finish: frozenset[Key]
    learnt: Variables
    """A key in place of every leaf that the stage leaves."""
    state: State
    """Shapes of one lane's state."""
    take_step: Dependence
    """The step of one lane, traced."""


class Needs(NamedTuple):
    """What a whole method reads."""

    shapes: dict[Key, jax.ShapeDtypeStruct]
    """Of one member."""
    init: frozenset[Key]
    """Of the pretrained weights, what `Method.init` reads."""
    initial: Variables
    """A key in place of every leaf."""
    stages: tuple[StageNeeds, ...]

    @property
    def learnt(self) -> Variables:
        """A key in place of every leaf that the method leaves."""
        return self.stages[-1].learnt if self.stages else self.initial

    def held(self, stage: int, *, started: bool) -> frozenset[Key]:
        """What is held from a stage on; `started`: its states are there already."""
        found = set() if started or stage == len(self.stages) else set(self.stages[stage].start)
        for number, needs in enumerate(self.stages[stage:]):
            found |= needs.step | needs.finish | (needs.start if number else set())
        found |= set(jax.tree.leaves(self.learnt))
        made_later = {str(number) for number in range(stage, len(self.stages))}
        return frozenset(key for key in found if key.split("/")[0] not in made_later)


def stages_as_run(method: Method, *, together: bool) -> tuple[Stage, ...]:
    """The stages of a method; without `together` cut into stages of one phase each.

    Raises:
        AgwmError: phases of one stage have different steps or plans of different shapes.
    """
    if not together:
        return tuple((phase,) for phase in method.phases)
    for stage in method.stages:
        alike = {name: rows.shape for name, rows in stage[0].plan.items()}
        for phase in stage[1:]:
            if phase.step != stage[0].step or {name: rows.shape for name, rows in phase.plan.items()} != alike:
                raise AgwmError(
                    f"phases {stage[0].name} and {phase.name} are one stage and differ in their step or the shapes of "
                    "their plans: phases that may run side by side share both; make them two stages."
                )
    return method.stages


def stage_name(stage: Stage) -> str:
    """Such as ``finetune`` or ``search-0..4``."""
    first, last = stage[0].name, stage[-1].name
    return first if len(stage) == 1 else f"{first}..{last.rsplit('-')[-1]}"


def find_needs(method: Method, weights: Shaped, data: Shaped, stages: Sequence[Stage]) -> Needs:
    """Trace the functions of a method for shapes; nothing is computed.

    Args:
        method: of one member.
        weights: the pretrained ones by path, or their shapes.
        data: columns of the training set, or their shapes.
        stages: of `stages_as_run`.
    """
    pretrained: Any = {path: _abstract(x) for path, x in weights.items()}
    data = {name: _abstract(x) for name, x in data.items()}
    random = jax.eval_shape(lambda: jax.random.key(0))
    sources = _named(pretrained, PRETRAINED)
    init = dependence(method.init, pretrained, random, by_name=True)
    initial = learnt = _results(init, (sources, ""), INITIAL)
    shapes = dict(zip(jax.tree.leaves((sources, initial)), jax.tree.leaves((pretrained, init.result)), strict=True))
    learnt_shapes, found = init.result, []
    steps: dict[Any, Dependence] = {}
    for number, stage in enumerate(stages):
        context, named = Context(pretrained, init.result, learnt_shapes), Context(sources, initial, learnt)
        starts = [dependence(start, context, random) for start in dict.fromkeys(phase.start for phase in stage)]
        state = starts[0].result
        args = (state, context, jax.eval_shape(_example_batches(stage[0]), data, random), random, _INTEGER)
        like = (stage[0].step, jax.tree.structure(args), *((x.shape, x.dtype) for x in jax.tree.leaves(args)))
        step = steps[like] = steps.get(like) or dependence(stage[0].step, *args)
        states = (state,) * len(stage)
        finish = dependence(partial(finish_all, stage), context, states, by_name=True)
        nameless = jax.tree.map(lambda _: "", states)
        learnt = _results(finish, (named, nameless), str(number))
        found.append(
            StageNeeds(
                named,
                frozenset().union(*(_keys_read(start, (named, "")) for start in starts)),
                _keys_read(step, (nameless[0], named, *jax.tree.map(lambda _: "", args[2:]))),
                _keys_read(finish, (named, nameless)),
                learnt,
                state,
                step,
            )
        )
        shapes |= dict(zip(jax.tree.leaves(learnt), jax.tree.leaves(finish.result), strict=True))
        learnt_shapes = finish.result
    return Needs(shapes, _keys_read(init, (sources, "")), initial, tuple(found))


def finish_all(stage: Stage, context: Context, states: Sequence[State]) -> Variables:
    """`Phase.finish` of all phases of a stage, in order; `states` holds the state of each."""
    for phase, state in zip(stage, states, strict=True):
        context = context._replace(learnt=phase.finish(context, state))
    return context.learnt


def fill(sources: Any, shapes: Mapping[Key, jax.ShapeDtypeStruct], held: Mapping[Key, Any]) -> Any:
    """The arrays that keys stand for; what is not held is not read, see `unread`."""
    return jax.tree.map(lambda key: held[key] if key in held else unread(shapes[key]), sources)


def unread(like: jax.ShapeDtypeStruct) -> Array:
    """Stands for an array that no result depends on; if one did, it would not be a number."""
    return jnp.full(like.shape, jnp.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0, like.dtype)


def _example_batches(phase: Phase):
    def batches(data, key):
        return step_batches(data, {name: jnp.asarray(rows[:1]) for name, rows in phase.plan.items()}, key, 0)

    return batches


def _abstract(x) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype))


def _named(tree, prefix: str) -> Any:
    def name(path, _) -> Key:
        return f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}"

    return jax.tree_util.tree_map_with_path(name, tree)


def _keys_read(found: Dependence, named_args: Any) -> frozenset[Key]:
    return frozenset(key for key, read in zip(jax.tree.leaves(named_args), found.reads, strict=True) if read and key)


def _results(found: Dependence, named_args: Any, prefix: str) -> Any:
    """A key for every leaf of a function's result."""
    given = jax.tree.leaves(named_args)
    own, structure = jax.tree.flatten(_named(found.result, prefix))
    names = [key if at is None else given[at] or key for key, at in zip(own, found.passes, strict=True)]
    return jax.tree.unflatten(structure, names)
