"""What a run needs of a device's memory, before anything is compiled, and what fits side by side."""

from typing import NamedTuple

from agwm_jax.build import Built
from agwm_jax.config import Config
from agwm_jax.train.sharding import Placement, make_placement


class SideBySide(NamedTuple):
    """How many runs go at once."""

    seeds: int
    splits: int


def build_placement(config: Config) -> Placement:
    mesh = config.mesh
    return make_placement(seed=mesh.seed, data=mesh.data, model=mesh.model, fully_sharded=mesh.fully_sharded)


def choose(config: Config, built: Built, placement: Placement, *, num_seeds: int) -> SideBySide:
    splits = config.search.num_splits if config.method.name == "agwm" else 1
    v = config.run.vectorize
    return SideBySide(
        num_seeds if v in ("auto", "all", "seeds") else 1, splits if v in ("auto", "all", "splits") else 1
    )
