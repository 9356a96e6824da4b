"""All of the configuration: schema, YAML and the command line."""

from agwm_jax.settings.config import deciding_settings as deciding_settings
from agwm_jax.settings.config import dump_config as dump_config
from agwm_jax.settings.config import load_config as load_config
from agwm_jax.settings.config import parse_config as parse_config
from agwm_jax.settings.config import seed_configs as seed_configs
from agwm_jax.settings.deterministic import use_deterministic_kernels as use_deterministic_kernels
from agwm_jax.settings.schema import Config as Config
from agwm_jax.settings.words import all_settings as all_settings
