"""The page on tasks of one's own: its code runs, its config is read, and its source and metric are used like ours."""

import importlib.metadata
import re

import numpy as np
import pytest
import yaml
from pydantic import ValidationError

from agwm_jax import metrics
from agwm_jax.data.encode import encode_draws
from agwm_jax.data.sources.base import TASK_SOURCES
from agwm_jax.data.sources.local import LocalTask
from agwm_jax.errors import AgwmError
from agwm_jax.registry import Registry
from agwm_jax.section import Choice


class Letters:
    """A tokenizer of letters."""

    pad_token_id = 0

    def num_special_tokens_to_add(self, pair):
        return 0

    def __call__(self, texts, **options):
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


@pytest.fixture
def page(request, monkeypatch):
    """The blocks of the page by language, its Python run; what that registers is forgotten afterwards."""
    text = (request.config.rootpath / "docs" / "write_your_own" / "task.md").read_text()
    for registry in (TASK_SOURCES, metrics.METRICS):
        assert len(registry)
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, names)
    return dict(re.findall(r"```(yaml|toml)\n(.*?)```", text, re.S))


def test_the_source_is_chosen_by_its_name(page, tmp_path, monkeypatch):
    for split, texts in {
        "train": {"bad": ["dull", "slow", "flat"], "good": ["fine", "bright"]},
        "dev": {"good": ["fun"]},
    }.items():
        for name, given in texts.items():
            (tmp_path / "reviews" / split / name).mkdir(parents=True)
            for index, text in enumerate(given):
                (tmp_path / "reviews" / split / name / f"{index}.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(page["yaml"])["task"] | {"train_size": 4}
    source = Choice(TASK_SOURCES, default="agreement", key="source").validate(settings)
    assert (source.source, source.train_size, source.columns()) == ("class_folders", 4, (("text",), "label"))
    task = source.load()
    assert task.splits["train"].to_dict() == {
        "text": ["dull", "slow", "flat", "fine", "bright"],
        "label": [0, 0, 0, 1, 1],
    }
    assert list(task.splits["validation"]["label"]) == [1]
    assert len(source.digests()) == 6
    (draw,) = encode_draws(task, Letters(), seeds=[0], rows=source.rows)
    assert draw.encoded["train"]["input_ids"].shape == (4, 8)
    assert TASK_SOURCES["class_folders"].summary == "A file for each text, in a folder with the name of its class."


def test_the_metric_is_used_like_ours(page):
    got = metrics.compute(["within_half", "pearson"], np.array([[1.0], [2.0], [9.0]]), np.array([1.4, 2.6, 9.0]))
    assert got["within_half"] == pytest.approx(2 / 3)
    files = {"train": "a.csv", "validation": "b.csv"}
    assert LocalTask(files=files, kind="regression", metrics=("within_half",)).metrics == ("within_half",)
    with pytest.raises(ValidationError, match="'within_half' is no metric for classification"):
        LocalTask(files=files, metrics=("within_half",))


def test_a_metric_without_a_kind_is_named(page):
    metrics.METRICS.register("odd")(lambda labels, predictions: 0.0)
    with pytest.raises(AgwmError, match="the metric 'odd' was registered with kind None: give one of classification"):
        metrics.check(["odd"], kind="regression")


def test_the_entry_points_are_the_registries_groups(page, monkeypatch):
    asked = []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: asked.append(group) or ())
    for registry in (TASK_SOURCES, metrics.METRICS):
        list(Registry(registry.kind, registry.plural, registry._package))
    assert asked == re.findall(r'entry-points\."(.*?)"', page["toml"])
