"""The estimators of alpha's hypergradient and what each can be told."""

from typing import Annotated, Literal

from pydantic import Field, WrapValidator, model_validator

from agwm_jax.section import Section, default_tag, one_fault, refuse


class FirstOrder(Section):
    """Direct term alone."""

    estimator: Literal["first_order"] = Field(description="how alpha's gradient is estimated")


Products = Literal["linearize", "jvp", "finite_difference"]
_PRODUCTS = "products with second derivatives: linearize (fastest), jvp (least memory), finite_difference (first-order)"
_STEP_SIZE = "eta; below 2 / (largest eigenvalue) it converges; auto: 1 / (largest eigenvalue), by power iterations"
StepSize = Annotated[Annotated[float, Field(gt=0)] | Literal["auto"], WrapValidator(one_fault)]


class Unrolled(Section):
    """Reverse mode through the look-ahead updates, optimiser included."""

    estimator: Literal["unrolled"] = Field(default="unrolled", description="how alpha's gradient is estimated")
    num_steps: int | None = Field(
        default=None, ge=1, description="updates to differentiate, the last ones; null: all of the look-ahead"
    )
    hvp: Products = Field(default="linearize", description=_PRODUCTS)


class Implicit(Section):
    """What the implicit estimators have in common."""

    hvp: Products = Field(default="linearize", description=_PRODUCTS)
    curvature: Literal["hessian", "gauss_newton"] = Field(
        default="hessian", description="matrix of the linear system; gauss_newton is never indefinite"
    )


class Iteration(Implicit):
    """Implicit estimators that step along the residual of the linear system."""

    step_size: StepSize = Field(default="auto", description=_STEP_SIZE)
    power_iterations: int = Field(default=3, ge=1, description="products that step_size auto spends an outer step")
    resample: bool = Field(
        default=False, description="take the products on the inner batches of the look-ahead in turn (stocBiO)"
    )

    @model_validator(mode="after")
    def _resampling_linearises_nothing(self):
        clash = self.resample and self.hvp == "linearize"
        refuse((clash, "hvp: got linearize; allowed with resample: jvp, finite_difference"))
        return self


class Neumann(Iteration):
    """Implicit differentiation by a truncated Neumann series."""

    estimator: Literal["neumann"] = Field(description="how alpha's gradient is estimated")
    num_terms: int = Field(default=3, ge=1, description="terms of the series, exactly")


class GradientDescent(Iteration):
    """Implicit differentiation, the linear system solved along with the search (single-loop: SOBA, AmIGO)."""

    estimator: Literal["gradient_descent"] = Field(description="how alpha's gradient is estimated")
    num_steps: int = Field(default=1, ge=1, description="steps on the linear system for one of alpha")


class ConjugateGradient(Implicit):
    """Implicit differentiation by conjugate gradients."""

    estimator: Literal["conjugate_gradient"] = Field(description="how alpha's gradient is estimated")
    num_steps: int = Field(default=5, ge=1, description="steps of conjugate gradients for one of alpha")
    damping: float = Field(default=0.0, ge=0, description="added to the diagonal of the linear system")
    warm_start: bool = Field(default=False, description="start from the solution of the outer step before")


class Nystrom(Implicit):
    """Implicit differentiation with a random low-rank approximation of the curvature."""

    estimator: Literal["nystrom"] = Field(description="how alpha's gradient is estimated")
    rank: int = Field(default=5, ge=1, description="rank of the approximation, as many products")
    rho: float = Field(default=1.0, gt=0, description="curvature that directions outside the sketch are taken to have")


class FiniteDifference(Section):
    """Inner response by a central difference along the outer gradient (DARTS, SAMA)."""

    estimator: Literal["finite_difference"] = Field(description="how alpha's gradient is estimated")
    radius: float = Field(default=0.1, gt=0, description="norm of the step to either side")
    step_size: float = Field(default=1.0, gt=0, description="factor of the outer gradient; DARTS: the learning rate")
    precondition: bool = Field(default=False, description="take direction and size from the optimiser's update (SAMA)")

    @model_validator(mode="after")
    def _one_scale(self):
        clash = self.precondition and self.step_size != 1
        refuse((clash, "step_size: leave it at 1 with precondition, for the optimiser's update sets the scale"))
        return self


class Penalty(Section):
    """Two inner copies and a penalty, first derivatives only (F2SA)."""

    estimator: Literal["penalty"] = Field(description="how alpha's gradient is estimated")
    weight: float = Field(default=10.0, gt=0, description="lambda of the penalty at the first outer step")
    growth: float = Field(default=0.0, ge=0, description="added to lambda at every outer step")


Hypergradient = Annotated[
    FirstOrder | Unrolled | Neumann | GradientDescent | ConjugateGradient | Nystrom | FiniteDifference | Penalty,
    Field(discriminator="estimator"),
    default_tag("estimator", "unrolled"),
]
