"""The README's code does what it says."""

import re

import jax
import jax.numpy as jnp


def test_the_bilevel_example_runs(request):
    text = (request.config.rootpath / "README.md").read_text()
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "bilevel(problem" in code]
    names: dict = {}
    exec(block, names)
    x = jax.random.normal(jax.random.key(0), (8, 3))
    batch = {"x": x, "y": x.sum(1)}
    state = names["solver"].init(jnp.zeros(3), jnp.zeros(3))
    first = None
    for _ in range(20):
        state, info = names["step"](state, jax.tree.map(lambda leaf: leaf[None], batch), batch)
        first = info["outer_loss"] if first is None else first
    assert info["outer_loss"] < first


def test_the_settings_it_names_exist(request):
    from agwm_jax.settings.words import all_settings

    text = (request.config.rootpath / "README.md").read_text()
    table = re.findall(r"^\| `([^|]*)` \|", text, re.M)
    named = [name for row in table for name in re.split(r"`, `", row) if "." in name]
    known = {setting.path for setting in all_settings()} | {"hypergradient.estimator"}
    assert len(named) > 10
    assert [name for name in named if name not in known] == []
