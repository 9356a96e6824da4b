"""Models as pure functions: BERT in Flax NNX, and Hugging Face folders in and out."""

from agwm_jax.models.bert import BertClassifier as BertClassifier
from agwm_jax.models.bert import BertConfig as BertConfig
from agwm_jax.models.functional import functionalize as functionalize
from agwm_jax.models.huggingface import Pretrained as Pretrained
from agwm_jax.models.huggingface import load_pretrained as load_pretrained
from agwm_jax.models.huggingface import save_pretrained as save_pretrained
from agwm_jax.models.huggingface import transformers_compatible as transformers_compatible
