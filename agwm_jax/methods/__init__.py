"""Fine-tuning methods: each is a sequence of stages that the one training loop runs."""

from agwm_jax.methods.agwm import agwm as agwm
from agwm_jax.methods.frozen_alpha import frozen_alpha as frozen_alpha
from agwm_jax.methods.phase import Method as Method
from agwm_jax.methods.phase import Phase as Phase
from agwm_jax.methods.phase import Weights as Weights
from agwm_jax.methods.vanilla import vanilla as vanilla
