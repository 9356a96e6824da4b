"""Models as pure functions: families of encoders in Flax NNX, and Hugging Face folders in and out."""

from agwm_jax.models.family import FAMILIES as FAMILIES
from agwm_jax.models.family import Family as Family
from agwm_jax.models.family import build_model as build_model
from agwm_jax.models.functional import functionalize as functionalize
from agwm_jax.models.huggingface import Pretrained as Pretrained
from agwm_jax.models.huggingface import load_pretrained as load_pretrained
from agwm_jax.models.huggingface import save_pretrained as save_pretrained
from agwm_jax.models.huggingface import transformers_compatible as transformers_compatible
from agwm_jax.models.huggingface import with_head as with_head
from agwm_jax.models.model import Model as Model
