"""Attention-guided weights mixup: bi-level searches for alpha, their average, then fine-tuning at that alpha."""

from functools import partial
from typing import Annotated, Any, Literal

import jax
from jaxtyping import Array, Key
from pydantic import Field, model_validator

from agwm_jax.core.bilevel import BilevelSolver, BilevelState, Rollback, bilevel
from agwm_jax.core.estimators.base import ESTIMATORS
from agwm_jax.core.mixup import alpha_statistics, mixup_problem, project_alpha
from agwm_jax.core.types import Batch
from agwm_jax.data.plan import search_plan, split_indices
from agwm_jax.methods.interface import (
    METHODS,
    Batches,
    Context,
    Info,
    Method,
    MethodSettings,
    Phase,
    Plan,
    Setup,
    Variables,
)
from agwm_jax.methods.mixup import ALPHA, ClipOver, Mixture, Mixup, clip_with
from agwm_jax.methods.optimizers import OptimizerSettings
from agwm_jax.methods.search_warnings import search_warnings
from agwm_jax.methods.training import TASK, task_weights, training_phase
from agwm_jax.section import Choice, Section


class InnerOptimizer(OptimizerSettings):
    gradient_clip: float | None = Field(
        default=5.0, gt=0, description="largest global norm of the gradient, null for no clip"
    )


class OuterOptimizer(OptimizerSettings):
    learning_rate: float = Field(default=2e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    schedule: Literal["linear", "cosine", "constant"] = Field(default="cosine", description="decay after warm-up, to 0")
    gradient_clip: float | None = Field(
        default=None, gt=0, description="largest global norm of the gradient, null for no clip"
    )


class Search(Section):
    """The bi-level search: alpha on one part of the training set, W on the other."""

    epochs: int = Field(default=3, ge=1, description="passes over the training part of a split")
    num_splits: int = Field(
        default=1, ge=1, description="searches on random splits whose results are averaged (paper: 5)"
    )
    average: Literal["all", "alpha"] = Field(
        default="all", description="hand on the average of alpha and W, or of alpha alone"
    )
    validation_fraction: float = Field(
        default=0.2, gt=0, lt=1, description="share of the training set that alpha is fitted on"
    )
    inner_steps: int = Field(default=1, ge=1, description="updates of W for one of alpha")
    rollback: Rollback = Field(
        default=True,
        description="take the kept inner updates anew with the new alpha (costs inner_steps passes); from_look_ahead "
        "takes them on top of those, as Betty 0.2.0 did",
    )
    dropout: Literal["shared", "separate"] = Field(
        default="shared",
        description="the masks of an iteration's passes over one batch; separate, as in PyTorch, makes noise of a "
        "finite difference",
    )
    extra_step: bool = Field(
        default=False, description="epochs x (n // batch_size + 1) steps, as the authors' script counts them"
    )
    anchor: float = Field(
        default=0.0, ge=0, description="anchor/2 |W - W0|^2 in the inner loss; 0 makes alpha unidentifiable"
    )
    inner: InnerOptimizer = Field(default=InnerOptimizer(), description="optimiser of the task weights W")
    outer: OuterOptimizer = Field(default=OuterOptimizer(), description="optimiser of alpha")

    def plans(self, setup: Setup) -> list[Plan]:
        """``{"inner": [steps, k, b], "outer": [steps, b]}`` of every split."""
        found: list[Plan] = []
        for index in range(self.num_splits):
            rng = setup.rng(f"search-{index}")
            train, validation = split_indices(setup.num_examples, validation_fraction=self.validation_fraction, rng=rng)
            inner, outer = search_plan(
                train,
                validation,
                batch_size=setup.batch_size,
                inner_steps=self.inner_steps,
                epochs=self.epochs,
                rng=rng,
                extra_step=self.extra_step,
            )
            found.append({"inner": inner, "outer": outer})
        return found


@METHODS.register("agwm", cost="search: of the estimator; finetune: 1", paper="arXiv 2403.12918")
class Agwm(MethodSettings):
    """Attention-guided weights mixup: a gate A between W and W0, learnt by bi-level optimisation.

    On each of `search.num_splits` random splits of the training set, from the pretrained weights:
    ``min_alpha L_val(mix(W0, W*, alpha))`` where ``W* = argmin_W L_train(mix(W0, W, alpha)) + anchor/2 |W - W0|^2``.
    The results are averaged; then alpha is fixed and W is trained on the whole training set with a fresh optimiser.
    Accumulation of gradients is for that second stage: the search takes its batches whole.

    What the authors' published code does, and what Betty 0.2.0 made of it, are options of the search, its estimator and
    its optimisers, none of them a default; ``configs/authors.yaml`` and ``authors_as_run.yaml`` have them together.

    Cost of a search step: of the estimator, and one fb an inner step with `search.rollback`; of a finetune step 1 fb.
    Memory: of the estimator, and W0 beside W. Source: arXiv 2403.12918.
    """

    name: Literal["agwm"] = Field(default="agwm", description="fine-tuning method")
    mixup: Mixup = Field(default=Mixup(), description="which weights are mixed, and how")
    search: Search = Field(default=Search(), description="the bi-level search for alpha")
    estimator: Annotated[Any, Choice(ESTIMATORS, default="unrolled")] = Field(
        default={}, description="how alpha's hypergradient is estimated"
    )
    finetune_clip: ClipOver = Field(
        default="trained",
        description="whose gradients count in the norm that finetune clips: trained weights; gate: and alpha's; all: "
        "and those of the mixed weights' W0, as in the authors' code",
    )

    @model_validator(mode="after")
    def _estimator_fits_the_look_ahead(self):
        check = ESTIMATORS[self.estimator.name].facts.get("check")
        if check is not None:
            check(self.estimator, inner_steps=self.search.inner_steps)
        return self

    @property
    def extra_passes(self) -> int:
        """Those of one search."""
        return self.search.epochs

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        mixture = Mixture(self.mixup, setup)
        plans = self.search.plans(setup)
        solver = _Solver(self, setup, mixture, plans[0])

        def init(pretrained, key) -> Variables:
            return {TASK: task_weights(setup, pretrained), ALPHA: mixture.init_alpha(key, pretrained)}

        searches = tuple(
            Phase(
                f"search-{index}",
                plan,
                solver.start,
                solver.step,
                partial(solver.finish, index=index),
                monitor=lambda state: alpha_statistics(state.outer),
            )
            for index, plan in enumerate(plans)
        )
        finetune = training_phase(
            setup, forward=mixture.forward, keeps=(ALPHA,), clip_with=clip_with(self.finetune_clip, mixture.mixed)
        )
        return Method(init, (searches, (finetune,)), mixture.merge, search_warnings)


class _Solver:
    """The functions that all searches of one method share."""

    def __init__(self, settings: Agwm, setup: Setup, mixture: Mixture, plan: Plan):
        steps, inner_steps = plan["inner"].shape[:2]
        search = settings.search
        self._search, self._setup, self._mixture = search, setup, mixture
        self._renew = _own_dropout if search.dropout == "separate" else None
        self._estimator = settings.estimator.build(scale=search.inner.rms_scale(setup.model.weights), renew=self._renew)
        reverse_only = not self._estimator.forward_mode
        self._loss, self._validation_loss = (
            setup.training_loss(reverse_only=reverse_only),
            setup.loss(reverse_only=reverse_only),
        )
        self._inner_tx = setup.optimizer(search.inner, num_steps=steps * inner_steps)
        self._outer_tx = search.outer.build(num_steps=steps, weights=setup.model.weights)

    def _bilevel(self, pretrained) -> BilevelSolver:
        problem = mixup_problem(
            self._loss,
            self._mixture.partition(pretrained),
            validation_loss=self._validation_loss,
            complement=self._mixture.settings.complement,
            anchor=self._search.anchor,
        )
        return bilevel(
            problem,
            self._estimator,
            inner_tx=self._inner_tx,
            outer_tx=self._outer_tx,
            project=project_alpha,
            rollback=self._search.rollback,
            renew=self._renew,
        )

    def start(self, context: Context, key: Key[Array, ""]) -> BilevelState:
        """From the pretrained weights, at an alpha of the split's own."""
        alpha = self._mixture.init_alpha(key, context.pretrained)
        return self._bilevel(context.pretrained).init(context.initial[TASK], alpha)

    def step(self, state: BilevelState, context: Context, batches: Batches, key, step) -> tuple[BilevelState, Info]:
        """One outer iteration."""
        del key, step
        state, info = self._bilevel(context.pretrained).step(state, batches["inner"], batches["outer"])
        return state, {"loss": info.pop("inner_loss"), **info}

    def finish(self, context: Context, state: BilevelState, *, index: int) -> Variables:
        """The running mean over searches: after the last, the average over all of them."""
        task = state.inner.params if self._search.average == "all" else context.learnt[TASK]
        found = {TASK: task, ALPHA: state.outer}
        if index == 0:
            return found
        return jax.tree.map(lambda mean, x: mean + (x - mean) / (index + 1), context.learnt, found)


def _own_dropout(batch: Batch, number) -> Batch:
    """The batch for another pass over it, with masks of that pass's own."""
    return {**batch, "key": jax.random.fold_in(batch["key"], number)} if "key" in batch else batch
