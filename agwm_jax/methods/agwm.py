"""Attention-guided weights mixup: bi-level searches for alpha, their average, then fine-tuning at that alpha."""

from functools import partial
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jaxtyping import Array, Key
from pydantic import Field, model_validator

from agwm_jax.core.bilevel import BilevelSolver, BilevelState, Rollback, bilevel
from agwm_jax.core.estimators.base import ESTIMATORS
from agwm_jax.core.types import Batch, Params
from agwm_jax.methods.alpha_after import alpha_phase, several, weights_phase
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
    Stage,
    Variables,
)
from agwm_jax.methods.leverage import ALPHAS, leverage_phase
from agwm_jax.methods.mixup import ALPHA, ClipOver, Mixture, Mixup, clip_with
from agwm_jax.methods.optimizers import OptimizerSettings
from agwm_jax.methods.search_plans import plans_for_after, search_plans, side_by_side
from agwm_jax.methods.search_warnings import search_warnings
from agwm_jax.methods.training import TASK, task_weights, training_phase
from agwm_jax.section import Choice, Located, Section, refuse


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
    when: Literal["during", "after"] = Field(
        default="during",
        description="fit alpha while W is trained (bi-level), or after that through the W of every split",
    )
    splits: Literal["random", "folds"] = Field(
        default="random",
        description="validation parts: drawn for each search anew, or disjoint folds for which one alpha is fitted",
    )
    num_splits: int = Field(
        default=1, ge=1, description="searches on random splits whose results are averaged (paper: 5), or folds"
    )
    validation: Annotated[str, Field(min_length=1), Located(words=("split",))] = Field(
        default="split",
        description="what alpha is fitted on: split (a part of the training set), or a labelled file; W then trains on "
        "the whole training set",
    )
    alpha_epochs: int = Field(default=3, ge=1, description="passes over the validation parts with when after")
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
    leverage: bool = Field(
        default=True,
        description="after the search, read the validation parts once with the learnt gate, with A = 1 and with other "
        "single numbers, for the report",
    )
    inner: InnerOptimizer = Field(default=InnerOptimizer(), description="optimiser of the task weights W")
    outer: OuterOptimizer = Field(default=OuterOptimizer(), description="optimiser of alpha")

    @model_validator(mode="after")
    def _splits_fit_together(self):
        folds = self.splits == "folds"
        refuse(
            (folds and self.num_splits < 2, f"num_splits: got {self.num_splits}; allowed: 2 or more with splits folds"),
            (
                folds and self.validation != "split",
                "splits: got folds; allowed: random with a validation file, for W then sees the whole training set",
            ),
            (
                self.when == "after" and self.inner_steps != 1,
                f"inner_steps: got {self.inner_steps}; allowed: 1 with when after, where alpha waits for the last of W",
            ),
        )
        return self

    @property
    def is_measured(self) -> bool:
        """Whether a phase tells of the gate's leverage; where W is left at W0 no gate would change a thing."""
        return self.leverage and self.average == "all"

    def plans(self, setup: Setup) -> list[Plan]:
        """``{"inner": [steps, k, b], "outer": [steps, b]}`` of every split, all of one shape."""
        return search_plans(self, setup)

    def leave(self, context: Context, weights: Params) -> Params:
        """The task weights that follow those of several splits, ``[K, ...]`` by path: as `average` says."""
        if self.average == "alpha":
            return context.learnt[TASK]
        return jax.tree.map(lambda x: x.mean(axis=0), weights)


@METHODS.register("agwm", cost="search: of the estimator; leverage: 4; finetune: 1", paper="arXiv 2403.12918")
class Agwm(MethodSettings):
    """Attention-guided weights mixup: a gate A between W and W0, learnt by bi-level optimisation.

    On each of `search.num_splits` random splits of the training set, from the pretrained weights:
    ``min_alpha L_val(mix(W0, W*, alpha))`` where ``W* = argmin_W L_train(mix(W0, W, alpha)) + anchor/2 |W - W0|^2``.
    The results are averaged; then alpha is fixed and W is trained on the whole training set with a fresh optimiser.
    Accumulation of gradients is for that second stage: the search takes its batches whole.

    What the authors' published code does, and what Betty 0.2.0 made of it, are options of the search, its estimator and
    its optimisers, none of them a default; ``configs/authors.yaml`` and ``authors_as_run.yaml`` have them together.

    With ``search.splits: folds`` the K validation parts are disjoint, and one alpha is fitted on the mean of their
    losses, each through the W of its own fold; the W's are averaged. With ``search.when: after`` W is trained first, on
    the training part of every split and through the mixture where alpha starts (plain fine-tuning at A = 1); then one
    alpha is fitted through these fixed W's, on the mean of the losses of their validation parts, whose gradient is
    exact. `search.leverage` reads the validation parts once more between the stages, for the report. `estimator`,
    `search.inner_steps` and `search.rollback` are for the bi-level search alone.

    Cost of a search step: of the estimator, and one fb an inner step with `search.rollback`; K times that with folds;
    with ``when: after`` K fb a step of W, and as much for one of alpha; of a finetune step 1 fb. Memory: of the
    estimator, and W0 beside W; K times W, its optimiser and the estimator's with folds and `after`. When to use: folds
    and few-number gates (`mixup.gate`) for small sets, for each example then counts for alpha; `after` where a search
    is too dear. Source: arXiv 2403.12918; folds, `after` and gates other than low_rank are this library's own.
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
        ends_elsewhere = not getattr(self.estimator, "restore", True) and self.search.rollback is True
        refuse(
            (
                ends_elsewhere,
                "search.rollback: got true; allowed: false or from_look_ahead with estimator.restore false, for the "
                "weights that it leaves are those that a rollback throws away",
            )
        )
        return self

    @property
    def extra_passes(self) -> int:
        """Those of W in one search; alpha's own, a fifth as long with `when` after, are not counted."""
        return self.search.epochs

    @property
    def reads(self) -> tuple[str, ...]:
        """The validation file, where there is one."""
        return () if self.search.validation == "split" else (self.search.validation,)

    def build(self, setup: Setup) -> Method:
        """The method for one seed."""
        mixture = Mixture(self.mixup, setup)
        searches = self._after(setup, mixture) if self.search.when == "after" else self._during(setup, mixture)

        def init(pretrained, key) -> Variables:
            return {TASK: task_weights(setup, pretrained), ALPHA: mixture.init_alpha(key, pretrained)}

        if self.search.is_measured:
            plans = [phase.plan["outer"] for stage in searches for phase in stage if "outer" in phase.plan]
            rows = np.unique(np.concatenate([plan.ravel() for plan in plans]))
            searches = (*searches, (leverage_phase(setup, mixture, rows[rows >= 0]),))
        finetune = training_phase(
            setup, forward=mixture.forward, keeps=(ALPHA,), clip_with=clip_with(self.finetune_clip, mixture.mixed)
        )
        return Method(init, (*searches, (finetune,)), mixture.merge, search_warnings)

    def _during(self, setup: Setup, mixture: Mixture) -> tuple[Stage, ...]:
        """Searches side by side, or one search of all folds."""
        plans = self.search.plans(setup)
        folds = len(plans) if self.search.splits == "folds" else None
        solver = _Solver(self, setup, mixture, plans[0], folds)
        if folds is not None:
            named, finishes = {"search": side_by_side(plans)}, [solver.finish_folds]
        else:
            named = {f"search-{index}": plan for index, plan in enumerate(plans)}
            finishes = [partial(solver.finish, index=index) for index in range(len(plans))]
        phases = (
            Phase(
                name,
                plan,
                solver.start,
                solver.step,
                finish,
                monitor=lambda state: mixture.statistics(state.outer),
            )
            for (name, plan), finish in zip(named.items(), finishes, strict=True)
        )
        return (tuple(phases),)

    def _after(self, setup: Setup, mixture: Mixture) -> tuple[Stage, ...]:
        """W of every split, then alpha."""
        search = self.search
        train, outer = plans_for_after(search, setup)
        tx = setup.optimizer(search.inner, num_steps=len(train["train"]))
        outer_tx = search.outer.build(num_steps=len(outer["outer"]), weights=setup.model.weights)
        weights = weights_phase(setup, mixture, train, tx=tx, anchor=search.anchor)
        alpha = alpha_phase(setup, mixture, outer, tx=outer_tx, leave=search.leave)
        return (weights,), (alpha,)


class _Solver:
    """The functions that all searches of one method share."""

    def __init__(self, settings: Agwm, setup: Setup, mixture: Mixture, plan: Plan, folds: int | None):
        steps, inner_steps = plan["inner"].shape[:2]
        self._folds = folds
        search = settings.search
        self._search, self._mixture = search, mixture
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
        problem = self._mixture.problem(
            pretrained, self._loss, validation_loss=self._validation_loss, anchor=self._search.anchor
        )
        return bilevel(
            problem,
            self._estimator,
            inner_tx=self._inner_tx,
            outer_tx=self._outer_tx,
            project=self._mixture.project,
            rollback=self._search.rollback,
            renew=self._renew,
            num_inner=self._folds,
        )

    def start(self, context: Context, key: Key[Array, ""]) -> BilevelState:
        """From the pretrained weights, at an alpha of the split's own."""
        alpha = self._mixture.init_alpha(key, context.pretrained)
        task = context.initial[TASK]
        task = task if self._folds is None else several(task, self._folds)
        return self._bilevel(context.pretrained).init(task, alpha)

    def step(self, state: BilevelState, context: Context, batches: Batches, key, step) -> tuple[BilevelState, Info]:
        """One outer iteration."""
        del key, step
        state, info = self._bilevel(context.pretrained).step(state, batches["inner"], batches["outer"])
        return state, {"loss": info.pop("inner_loss"), **info}

    def finish(self, context: Context, state: BilevelState, *, index: int) -> Variables:
        """The running mean over searches: after the last, the average over all of them."""
        task = state.inner.params if self._search.average == "all" else context.learnt[TASK]
        found = {TASK: task, ALPHA: state.outer}
        if index > 0:
            before = {name: context.learnt[name] for name in found}
            found = jax.tree.map(lambda mean, x: mean + (x - mean) / (index + 1), before, found)
        if not self._search.is_measured or self._search.num_splits == 1:
            return found
        return {**found, ALPHAS: {**(context.learnt[ALPHAS] if index else {}), str(index): state.outer}}

    def finish_folds(self, context: Context, state: BilevelState) -> Variables:
        """The mean of all W, and the alpha that they share."""
        return {TASK: self._search.leave(context, state.inner.params), ALPHA: state.outer}


def _own_dropout(batch: Batch, number) -> Batch:
    """The batch for another pass over it, with masks of that pass's own."""
    return {**batch, "key": jax.random.fold_in(batch["key"], number)} if "key" in batch else batch
