"""Who may import whom."""

import subprocess
import sys

HEAVY = ("flax", "transformers", "datasets", "orbax", "torch", "pydantic", "safetensors", "sklearn", "matplotlib")


def loaded_after(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after a statement."""
    program = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


def test_a_file_imports_only_from_the_layers_below_it(request):
    # In a process of its own: import-linter takes over the output streams.
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=request.config.rootpath, capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_package_loads_its_core_alone():
    assert not loaded_after("import agwm_jax") & {"jax", "numpy", *HEAVY}
    loaded = loaded_after("from agwm_jax import bilevel, hypergrad")
    assert "jax" in loaded
    assert not loaded & set(HEAVY)


def test_the_command_line_loads_nothing_heavy_before_it_knows_the_command():
    assert not loaded_after("import agwm_jax.cli") & set(HEAVY)
