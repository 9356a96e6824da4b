"""Zero-shot similarity: a pair that is cut on the device gives the features of its texts, each read alone."""

import jax
import numpy as np
import pytest
from harness import setup_of

from agwm_jax.errors import AgwmError
from agwm_jax.methods.zero_shot import ZeroShot, cosine_of_pairs, each_text
from agwm_jax.models.family import FAMILIES, build_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

CLS, SEP = 2, 3
FIRST = [[5, 6], [7], [8, 9, 10, 11]]
SECOND = [[12, 13, 14], [5, 6, 7, 8], [9]]
LENGTH = 9


def encoded(rows, types):
    """Padded to `LENGTH` with rubbish ids, which nothing may read."""
    mask = np.array([[i < len(row) for i in range(LENGTH)] for row in rows])

    def padded(lists, fill):
        return np.array([row + [fill] * (LENGTH - len(row)) for row in lists], np.int32)

    columns = {"input_ids": padded(rows, 19), "token_type_ids": padded(types, 0)}
    return {**columns, "attention_mask": mask.astype(np.int32)}


def pairs():
    rows = [[CLS, *a, SEP, *b, SEP] for a, b in zip(FIRST, SECOND, strict=True)]
    types = [[0] * (len(a) + 2) + [1] * (len(b) + 1) for a, b in zip(FIRST, SECOND, strict=True)]
    return encoded(rows, types)


def singles(texts):
    rows = [[CLS, *text, SEP] for text in texts]
    return encoded(rows, [[0] * len(row) for row in rows])


def test_a_pair_is_cut_into_its_texts():
    found = jax.tree.map(np.asarray, each_text(pairs()))
    for offset, texts in ((0, FIRST), (1, SECOND)):
        expected = singles(texts)
        for name in ("attention_mask", "token_type_ids"):
            np.testing.assert_array_equal(found[name][offset::2], expected[name])
        real = expected["attention_mask"] != 0
        np.testing.assert_array_equal(found["input_ids"][offset::2][real], expected["input_ids"][real])


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_score_is_the_cosine_of_the_features_of_both_texts(pooling):
    family = FAMILIES["bert"].value()
    config = family.read_config({
        "vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8,
        "max_position_embeddings": LENGTH, "type_vocab_size": 2,
    })  # fmt: skip
    model, shapes = build_model(family, config, num_labels=1, pooling=pooling)
    rng = np.random.default_rng(0)
    params = {
        path: (rng.normal(0, 0.7, x.shape) + path.endswith("scale")).astype(x.dtype) for path, x in shapes.items()
    }
    a, b = (np.asarray(model.features(params, model.embed(params, x), x)) for x in map(singles, (FIRST, SECOND)))
    expected = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    found = cosine_of_pairs(model).apply(params, pairs(), reverse_only=True)
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-5)
    assert found.shape == (3, 1)
    assert expected.std() > 0.01
    bare = {name: x for name, x in pairs().items() if name != "token_type_ids"}
    with pytest.raises(AgwmError, match="tokenizer gives none"):
        cosine_of_pairs(model).apply(params, bare)


def test_it_is_for_scores_of_pairs():
    with pytest.raises(AgwmError, match="this task has classes"):
        ZeroShot().build(setup_of())
    with pytest.raises(AgwmError, match="this task has single texts"):
        ZeroShot().build(setup_of(num_labels=1)._replace(pair=False))
    method = ZeroShot().build(setup_of(num_labels=1))
    assert method.stages == ()
