"""Plain fine-tuning: nothing is mixed."""

import optax

from agwm_jax.core.types import LossFn
from agwm_jax.methods.finetune import finetune_phase
from agwm_jax.methods.phase import Method, Plan, no_alpha


def vanilla(loss: LossFn, plan: Plan, *, tx: optax.GradientTransformation) -> Method:
    """Train all task weights on the whole training set; arguments as `finetune_phase`."""
    return Method(no_alpha, ((finetune_phase(loss, plan, tx=tx),),))
