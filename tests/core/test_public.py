"""What `import agwm_jax` gives."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import agwm_jax

LIGHT = ("core", "registry", "errors", "hypergrad", "linear_solve")


def test_module_and_name_are_one():
    program = "import agwm_jax.hypergrad as a; from agwm_jax import hypergrad as b; assert a is b"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_has_one_home_and_type_checkers_see_the_same():
    tree = ast.parse(Path(agwm_jax.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    listed = {name: f"agwm_jax.{module}" for name, module in agwm_jax._NAMES.items()}
    modules = {name: f"agwm_jax.{home}".rpartition(".")[0] for name, home in agwm_jax._MODULES.items()}
    assert seen == {**listed, **modules}
    assert sorted(agwm_jax.__all__) == sorted(seen)
    assert set(agwm_jax.__all__) <= set(dir(agwm_jax))


@pytest.mark.parametrize("name", [n for n, home in agwm_jax._NAMES.items() if home.split(".")[0] in LIGHT])
def test_names_of_the_core_are_there_and_documented(name):
    assert getattr(agwm_jax, name) is getattr(sys.modules[f"agwm_jax.{agwm_jax._NAMES[name]}"], name)
    assert getattr(agwm_jax, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'hypergard'"):
        agwm_jax.hypergard  # noqa: B018
