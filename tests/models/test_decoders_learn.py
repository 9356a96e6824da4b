"""Decoders of two layers, trained end to end by the search for a gate, saved, and read again."""

import numpy as np
import pytest
from small_models import OF_TYPE
from tiny_folders import write_folder

from agwm_jax import fit, load_pretrained
from agwm_jax.errors import AgwmError

# Words that both tokenizers know something of; the label is whether the last one is w1.
TEXTS = [f"w{3 + i % 5} w{7 + i % 3} w{1 + i % 2}" for i in range(24)]
LABELS = ["no" if i % 2 else "yes" for i in range(24)]
METHOD = {"name": "agwm", "search": {"num_splits": 2, "epochs": 1, "outer": {"learning_rate": 1e-2}}}


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_decoder_learns_by_agwm(kind, tmp_path, quick_compilation):
    write_folder(tmp_path / "model", OF_TYPE["llama", kind]._replace(num_labels=2), kind)
    model = load_pretrained(tmp_path / "model", num_labels=2, unroll=1)
    assert model.pooling == "last"
    data = {"train": (TEXTS, LABELS), "test": (TEXTS, LABELS)}
    options = {"epochs": 4, "optimizer": {"learning_rate": 5e-3}}
    found = fit(model, METHOD, data, finetune=options, data={"batch_size": 4, "max_length": 16})
    losses = [record["loss"] for record in found.records if record["phase"] == "finetune"]
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    mixed = found.learnt["alpha"]
    assert {path.split(".")[-2] for path in mixed} >= {"query", "key", "value", "gate", "intermediate", "output"}
    found.save(tmp_path / "saved")
    again = load_pretrained(tmp_path / "saved")
    assert (again.pooling, again.head_initialised) == ("last", False)
    for path, weight in found.weights.items():
        np.testing.assert_array_equal(again.params[path], weight, err_msg=path)


def test_a_decoder_has_no_first_token_to_read(tmp_path):
    write_folder(tmp_path / "model", OF_TYPE["llama", "llama"], "llama")
    with pytest.raises(AgwmError, match="pooling is 'cls', expected 'last' or 'mean'"):
        load_pretrained(tmp_path / "model", num_labels=2, pooling="cls")


def test_a_decoder_is_no_regressor(tmp_path):
    write_folder(tmp_path / "model", OF_TYPE["llama", "llama"], "llama")
    model = load_pretrained(tmp_path / "model", num_labels=1)
    data = {"train": (TEXTS, [0.5 * i for i in range(24)]), "test": (TEXTS[:2], [0.0, 1.0])}
    with pytest.raises(AgwmError, match="no bias that could hold the mean of the labels"):
        fit(model, "vanilla", data, data={"batch_size": 4, "max_length": 16})
