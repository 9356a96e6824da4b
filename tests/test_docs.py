"""What README and the pages show is true: their code runs, and the settings and links that they name exist."""

import re

import jax
import jax.numpy as jnp
import pytest
import yaml

import agwm_jax

PAGES = ("README.md", "docs/library.md")


def blocks(path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_from_top_to_bottom(page, request):
    found = blocks(request.config.rootpath / page)
    assert found
    names: dict = {}
    for block in found:
        exec(block, names)
    kernel = names["weights"]["dense"]["kernel"]
    assert jnp.array_equal(kernel, names["params"]["dense"]["kernel"]), "W starts at W0, so any mixture of them is W0"


def test_the_bilevel_example_of_the_readme_learns(request):
    (block,) = [code for code in blocks(request.config.rootpath / "README.md") if "bilevel(problem" in code]
    names: dict = {}
    exec(block, names)
    x = jax.random.normal(jax.random.key(0), (8, 3))
    batch = {"x": x, "y": x.sum(1)}
    state = names["solver"].init(jnp.zeros(3), jnp.zeros(3))
    losses = []
    for _ in range(20):
        state, info = names["step"](state, jax.tree.map(lambda leaf: leaf[None], batch), batch)
        losses.append(float(info["outer_loss"]))
    assert losses[-1] < losses[0]


def test_the_settings_that_pages_name_exist(request):
    from agwm_jax.settings.words import all_settings

    known = {setting.path for setting in all_settings()} | {"method.estimator.name"}
    named = set()
    for page in ("README.md", *(f"docs/{name}.md" for name in ("index", "choose", "devices", "hypergradients"))):
        text = (request.config.rootpath / page).read_text()
        words = re.findall(r"`(?:--)?((?:task|model|data|loss|method|finetune|mesh|run)\.[\w.]+)", text)
        words += re.findall(r"--((?:task|model|data|loss|method|finetune|mesh|run)\.[\w.]+)", text)
        named |= set(words)
    assert len(named) > 15
    assert sorted(name for name in named if name not in known) == []


def test_the_readme_is_one_page_and_its_links_lead_somewhere(request):
    root = request.config.rootpath
    text = (root / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert [target for target in targets if not (root / target).exists()] == []


def test_the_citation_is_of_this_version(request):
    said = yaml.safe_load((request.config.rootpath / "CITATION.cff").read_text())
    changelog = (request.config.rootpath / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[(.+)\] - (.+)$", changelog, re.MULTILINE)
    assert (said["version"], str(said["date-released"])) == newest.groups()
    assert said["version"] == agwm_jax.__version__
