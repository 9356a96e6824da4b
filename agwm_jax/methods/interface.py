"""What a fine-tuning method is: settings that build stages of phases and a merge, by which the engine runs it."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import jax
import numpy as np
import optax
from jaxtyping import Array, Int, Key, Shaped

from agwm_jax.core.types import Batch, Composite, Params, Scalar
from agwm_jax.methods.warning import MethodWarning as MethodWarning
from agwm_jax.models.model import Model
from agwm_jax.registry import Registry
from agwm_jax.section import Section

if TYPE_CHECKING:
    from agwm_jax.methods.optimizers import OptimizerSettings
    from agwm_jax.methods.technique import Technique
    from agwm_jax.methods.training import Finetune

Variables = dict[str, Any]
"""What a method learns or carries, a dict of named collections. ``"task"`` holds trained weights by path; other names
are a method's own: ``"alpha"``, ``"lora"``, ``"mask"``. Each collection is a pytree whose dictionary keys are paths of
weights, so that its leaves lie on a mesh as their weights do."""

Plan = Mapping[str, Int[Any, "_ ..."]]
"""Rows of the training set for every step, ``[steps, *k, b]`` by the name of the batch; -1 pads a last short one."""

Batches = Mapping[str, Batch]
"""One step's batches by the names of the plan; each carries its own dropout key as ``key``."""

State = Any
"""A phase's own training state: any pytree."""

Info = dict[str, Scalar]


class Context(NamedTuple):
    """What the functions of a phase may read. What none of them reads, the engine does not hold on the devices."""

    pretrained: Params
    """All weights of the model as they were loaded, with a fresh head where the checkpoint has none: W0."""
    initial: Variables
    """As `Method.init` gave them."""
    learnt: Variables
    """What the phases before left; `initial` before the first."""


class Phase(NamedTuple):
    """One training run within a method. All functions are pure; the engine compiles, maps, donates, saves and resumes.

    Phases that share `step` and the shapes of their plans share one compiled program. The functions see one seed: the
    engine maps them over all that run at once.
    """

    name: str
    plan: Plan
    start: Callable[[Context, Key[Array, ""]], State]
    """``start(context, key) -> state``; the key is the phase's own. Leaves may be arrays of the context: who donates
    the state copies them first."""
    step: Callable[[State, Context, Batches, Key[Array, ""], Int[Array, ""]], tuple[State, Info]]
    """``step(state, context, batches, key, step) -> (state, info)``: `key` is this step's, for noise of the method's
    own (dropout keys ride in the batches), `step` counts from 0. ``info`` holds ``loss``, where there is one, and
    whatever is worth a curve."""
    finish: Callable[[Context, State], Variables]
    """``finish(context, state) -> learnt``: what later phases, `Method.merge` and the run folder get."""
    monitor: Callable[[State], Info] = lambda state: {}
    """Diagnostics too dear for every step; taken once a chunk of steps."""

    @property
    def num_steps(self) -> int:
        """Length of the plan."""
        return len(next(iter(self.plan.values())))


Stage = tuple[Phase, ...]
"""Phases that learn nothing from each other, with one `step` and plans of one shape: they may run side by side, and
their `finish` is called in order."""


ValueAndGrad = Callable[[Variables], tuple[Scalar, Variables]]
"""``value_and_grad(trained)`` of a step's batch."""


class Hooks(NamedTuple):
    """What a technique changes within the steps of a `training_phase`; None changes nothing.

    All are pure. `variables` and `grads` are dicts by collection; `key` is the technique's own at this step.
    """

    perturb: Callable[[Context, Variables, Key[Array, ""]], Variables] | None = None
    """``perturb(context, variables, key) -> variables`` of the forward pass; the gradient goes through it."""
    penalty: Callable[[Context, Variables], Scalar] | None = None
    """``penalty(context, variables)``, added to the objective."""
    differentiate: Callable[[ValueAndGrad, Variables], tuple[Scalar, Variables]] | None = None
    """``differentiate(value_and_grad, trained) -> (value, grads)``: where the gradient is taken."""
    gradient: Callable[[Variables, Context, Key[Array, ""]], Variables] | None = None
    """``gradient(grads, context, key) -> grads``, before the optimiser."""
    update: Callable[[Variables, Variables, Context, Variables, Int[Array, ""]], Variables] | None = None
    """``update(updates, grads, context, trained, step) -> updates``, after the optimiser; added to `trained`."""


class Method(NamedTuple):
    """A fine-tuning method, ready for the engine."""

    init: Callable[[Params, Key[Array, ""]], Variables]
    """``init(pretrained, key) -> variables``; leaves that start as a pretrained weight may be that very array."""
    stages: tuple[Stage, ...]
    """They follow each other. What a phase gets by chance (its key, its steps' keys, dropout) depends on the run's seed
    and the phase's name alone, so that a method that reduces to another one gives the same bits. A method that trains
    nothing has none."""
    merge: Callable[[Params, Variables], Params]
    """``merge(pretrained, learnt) -> weights of the forward pass``, all paths of the model: what is evaluated,
    predicted with and exported."""
    warnings: Callable[[Sequence[Mapping[str, Any]]], Sequence[MethodWarning]] = lambda records: ()
    """Failure signatures in the records of a run, while it runs or after."""
    model: Model | None = None
    """What evaluates, where it is not the setup's model. Its outputs are taken as they are, also where labels were put
    into another unit for training; and there is no plain model to be saved."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those of all stages, in order."""
        return tuple(phase for stage in self.stages for phase in stage)

    def learnt_shapes(self, pretrained: Mapping[str, Any], num_phases: int | None = None) -> Variables:
        """Shapes of what the first `num_phases` phases leave (None: all), given W0 or its shapes."""
        key = jax.random.key(0)
        initial = learnt = jax.eval_shape(self.init, pretrained, key)
        for phase in self.phases[:num_phases]:
            context = Context(dict(pretrained), initial, learnt)
            learnt = jax.eval_shape(phase.finish, context, jax.eval_shape(phase.start, context, key))
        return learnt


class Setup(NamedTuple):
    """What a method is built from, beside its own settings."""

    model: Model
    loss: Callable[..., Composite]
    """``loss(reverse_only=True)`` gives ``loss(params, batch) -> scalar``: a mean over the batch's real examples;
    ``False`` where second derivatives are taken, or forward-mode ones."""
    criterion: Callable[[Array, Batch], Scalar]
    """``criterion(logits [b, c], batch)``: the last part of the loss."""
    kind: str
    """Of the task: "classification" or "regression"."""
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    """Of every weight by path."""
    frozen: tuple[str, ...]
    """Paths that no method trains."""
    finetune: "Finetune"
    """Settings that all methods share: passes and optimiser."""
    batch_size: int
    num_examples: int
    """Of the training set."""
    rng: Callable[[str], np.random.Generator]
    """Random numbers for a use of that name; they depend on the run's seed and the name alone."""
    accumulate: int = 1
    """Into how many parts a batch is cut, whose gradients are summed; a bi-level search takes its batches whole."""
    rows: Mapping[str, range] = MappingProxyType({})
    """Rows of what `MethodSettings.reads` names, below those of the training set in one table; for plans."""
    objective: Callable[..., Composite] | None = None
    """Of the form of `loss`, and what training minimises where a technique has made another objective of it."""
    techniques: "tuple[Technique, ...]" = ()
    """What changes the training; see `Technique`."""
    labels: Shaped[np.ndarray, " n"] | None = None
    """Of the training set, for plans that depend on them. None where a finished run is read: its method is built for
    what it learnt, and does not run."""
    pair: bool = False
    """Whether every example is two texts."""

    @property
    def training_loss(self) -> Callable[..., Composite]:
        """`objective`, or `loss` where no technique has changed it: what every phase that trains W minimises."""
        return self.loss if self.objective is None else self.objective

    def optimizer(self, settings: "OptimizerSettings", *, num_steps: int) -> optax.GradientTransformation:
        """The optimiser of model weights, or of what stands for them, as the techniques change it."""
        tx = settings.build(num_steps=num_steps, weights=self.model.weights)
        for technique in self.techniques:
            tx = technique.change_optimizer(tx, self)
        return tx

    @property
    def trainable(self) -> tuple[str, ...]:
        """Paths of all weights that may be trained."""
        return tuple(path for path in self.model.weights if path not in self.frozen)


Part = Literal["objective", "gradient", "weights", "start", "end"]
"""Of a training: the loss of a batch; its gradient or the optimiser; the model's own weights W beside their start W0;
where they start; what is made of them at the end."""


class MethodSettings(Section):
    """The base of a method's settings; the file that holds them registers them in `METHODS`."""

    name: str

    open_to: ClassVar[frozenset[str]] = frozenset(get_args(Part))
    """What techniques may change of this method."""

    has_rate: ClassVar[bool] = True
    """Whether a learning rate changes what is learnt: False where nothing is trained by gradients."""

    @property
    def extra_passes(self) -> int:
        """Passes over the training set beside those of `Finetune`."""
        return 0

    @property
    def reads(self) -> tuple[str, ...]:
        """What the phases read beside the training set: names of splits, or paths of labelled files."""
        return ()

    def build(self, setup: Setup) -> Method:
        """The method for one seed.

        Raises:
            AgwmError: the settings do not fit the model, the task or the number of examples.
        """
        raise TypeError(f"{type(self).__name__} defines no build(setup)")


METHODS: Registry[type[MethodSettings]] = Registry("method", "methods", "agwm_jax.methods")
