"""Tiny programs run for microseconds: their time goes into compiling them."""

import jax
import pytest

from agwm_jax.engine import lanes

QUICKLY: dict = {"xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 11):  # gone since
    QUICKLY["xla_cpu_use_fusion_emitters"] = False


@pytest.fixture(scope="module", autouse=True)
def _quick(quick_compilation):
    """Half of the time to compile, for what runs in this process."""
    usual = lanes.compiler_options()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "compiler_options", lambda: {**usual, **QUICKLY})
        yield
