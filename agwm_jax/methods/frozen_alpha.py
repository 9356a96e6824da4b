"""The control: alpha stays at its random start and nothing is searched."""

from functools import partial
from typing import Literal

import optax

from agwm_jax.core.mixup import Complement, init_alpha
from agwm_jax.core.types import LossFn
from agwm_jax.methods.finetune import finetune_phase
from agwm_jax.methods.phase import Method, Plan


def frozen_alpha(
    loss: LossFn,
    plan: Plan,
    *,
    tx: optax.GradientTransformation,
    rank: int | Literal["full"] = 1,
    noise: float = 0.005,
    complement: Complement = "convex",
) -> Method:
    """Fine-tune through a mixture whose gate is drawn once; `rank` and `noise` as `agwm_jax.init_alpha`."""
    finetune = finetune_phase(loss, plan, tx=tx, complement=complement)
    return Method(partial(init_alpha, rank=rank, noise=noise), ((finetune,),))
