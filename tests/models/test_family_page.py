"""The code of docs/write_your_own/family.md: a family that is registered from outside is loaded, deferred and saved."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from agwm_jax.core.deferred import Deferred
from agwm_jax.errors import AgwmError
from agwm_jax.models.family import FAMILIES, family_of
from agwm_jax.models.huggingface import load_pretrained, save_pretrained
from agwm_jax.models.safetensors import to_tensors
from agwm_jax.models.weights import of_role

PAGE = Path(__file__).parents[2] / "docs" / "write_your_own" / "family.md"


@pytest.fixture
def page(monkeypatch):
    """What the page's code defines; its registration ends with the test."""
    monkeypatch.setattr(FAMILIES, "_entries", {name: FAMILIES[name] for name in FAMILIES})
    found = {"__name__": "page"}
    exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)), found)
    return found


def test_a_family_from_outside(page, tmp_path):
    params, batch = page["params"], page["batch"]
    family = family_of("bag", "config.json")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(page["config"].to_dict() | {"model_type": "bag"}))
    tensors = to_tensors(params, family, family.table(page["config"]))
    assert set(tensors) == {
        "bag.word.weight",
        *(f"bag.hidden.{part}" for part in ("weight", "bias")),
        *(f"classifier.{part}" for part in ("weight", "bias")),
    }
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    pretrained = load_pretrained(tmp_path / "model")
    np.testing.assert_array_equal(pretrained.model.apply(pretrained.params, batch), page["logits"])

    assert of_role(pretrained.model.weights, "kernel") == ("hidden.kernel",)
    doubled = Deferred(lambda x: 2 * x, (params["hidden.kernel"],))
    np.testing.assert_allclose(
        jax.jit(pretrained.model.apply)(params | {"hidden.kernel": doubled}, batch),
        pretrained.model.apply(params | {"hidden.kernel": 2 * params["hidden.kernel"]}, batch),
        rtol=1e-5,
    )

    save_pretrained(tmp_path / "out", params, pretrained, label_names=("no", "yes"))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    assert load_pretrained(tmp_path / "out").label_names == ("no", "yes")
    with pytest.raises(AgwmError, match="vocab_size is None, expected a whole number; hidden_size is 'x'"):
        family.read_config({"hidden_size": "x"})


def test_its_registration_ended():
    assert "bag" not in FAMILIES
