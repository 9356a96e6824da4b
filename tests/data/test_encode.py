"""Token arrays: the tokenizer's own ids, one length for a split, nothing cut unseen."""

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from agwm_jax.data.agreement import agreement_task
from agwm_jax.data.encode import encode, encode_task
from agwm_jax.data.tasks import Task
from agwm_jax.errors import AgwmError


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return AutoTokenizer.from_pretrained(minilm)


def split(lengths, label=0, **columns):
    """Texts of as many one-token words."""
    texts = [" ".join(["cat"] * length) for length in lengths]
    return datasets.Dataset.from_dict({"text": texts, "label": [label] * len(texts), **columns})


def test_same_ids_as_the_tokenizer(tokenizer):
    texts = ["A cat, naïve and unbelievably long-winded.", "Cats", ""]
    pairs = ["sat on the mat", "slept", "woke"]
    data = datasets.Dataset.from_dict({"text": texts, "text_pair": pairs, "label": [2, 0, 1]})
    encoded, report = encode(data, tokenizer, max_length=64)
    expected = tokenizer(texts, pairs, padding="max_length", max_length=report.length, return_tensors="np")
    assert report.length % 8 == 0
    assert report.truncated == 0
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        np.testing.assert_array_equal(getattr(encoded, name), expected[name])
        assert getattr(encoded, name).dtype == np.int32
    assert encoded.labels.tolist() == [2, 0, 1]
    assert encoded.labels.dtype == np.int32


@pytest.mark.parametrize(
    ("options", "length", "truncated"),
    [
        ({}, 24, 0),  # 18 + 2 special tokens, rounded up
        ({"pad_to": 0.5}, 8, 1),
        ({"pad_to": 0.7}, 24, 0),  # two of three are less than 0.7
        ({"pad_to": 1.0}, 24, 0),
        ({"max_length": 20}, 20, 0),  # the cap wins over the rounding
        ({"max_length": 16}, 16, 1),
        ({"max_length": 3}, 3, 3),
        ({"max_length": 512}, 24, 0),
    ],
)
def test_lengths(tokenizer, options, length, truncated):
    encoded, report = encode(split([2, 4, 18]), tokenizer, **options)
    assert encoded.input_ids.shape == (3, length)
    assert (report.length, report.truncated, report.longest, report.examples) == (length, truncated, 20, 3)
    tokens = encoded.attention_mask.sum(axis=1)
    assert tokens.tolist() == [min(n + 2, length) for n in (2, 4, 18)]
    assert report.padding == pytest.approx(1 - tokens.sum() / (3 * length))
    last = encoded.input_ids[np.arange(3), tokens - 1]
    assert (last == tokenizer.sep_token_id).all()  # a cut text still ends with its special token


def test_the_longer_text_of_a_pair_is_cut(tokenizer):
    data = split([20], text_pair=["dog dog"])
    encoded, report = encode(data, tokenizer, max_length=16)
    words = tokenizer.convert_ids_to_tokens(encoded.input_ids[0])
    assert words == ["[CLS]", *["cat"] * 11, "[SEP]", "dog", "dog", "[SEP]"]
    assert encoded.token_type_ids[0].tolist() == [0] * 13 + [1] * 3
    assert report.truncated == 1


def test_regression_labels_are_floats(tokenizer):
    encoded, _ = encode(split([1, 2], label=2.5), tokenizer, kind="regression")
    assert encoded.labels.dtype == np.float32
    assert encoded.labels.tolist() == [2.5, 2.5]


def test_no_labels_no_token_types(tokenizer):
    class Plain:
        pad_token_id = 9

        def num_special_tokens_to_add(self, pair):
            return 0

        def __call__(self, texts, **options):
            return {"input_ids": [[7] * len(text.split()) for text in texts]}

    encoded, _ = encode(split([1, 3]).remove_columns("label"), Plain())
    assert encoded.input_ids.tolist() == [[7] + [9] * 7, [7] * 3 + [9] * 5]
    assert not encoded.token_type_ids.any()
    assert encoded.labels.tolist() == [0, 0]


def test_evaluation_splits_share_a_length_and_are_never_cut_by_the_quantile(tokenizer):
    splits = {"train": split([4] * 9 + [30]), "validation": split([2] * 10 + [20]), "test": split([50])}
    task = Task("t", "classification", ("a", "b"), False, ("accuracy",), "test", splits)
    encoded, reports = encode_task(task, tokenizer, max_length=48, pad_to=0.9)
    assert {name: data.input_ids.shape[1] for name, data in encoded.items()} == {
        "train": 8,
        "validation": 48,
        "test": 48,
    }
    assert {name: report.truncated for name, report in reports.items()} == {"train": 1, "validation": 0, "test": 1}
    assert {name: report.length for name, report in reports.items()} == {"train": 8, "validation": 48, "test": 48}
    assert encoded["validation"].attention_mask.sum(axis=1).tolist() == [4] * 10 + [22]
    assert (encoded["validation"].input_ids[:, 22:] == tokenizer.pad_token_id).all()
    assert reports["validation"].padding == pytest.approx(1 - 62 / (11 * 48))


def test_agreement_sentences_are_short(tokenizer):
    task = agreement_task(train_size=160, validation_size=16, test_size=160)
    encoded, reports = encode_task(task, tokenizer)
    assert encoded["train"].input_ids.shape[1] <= 24
    assert not any(report.truncated for report in reports.values())
    assert not (encoded["train"].input_ids == tokenizer.unk_token_id).any()


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "no examples"),
        ([1], {"max_length": 2}, "max_length is 2, of which special tokens take 2"),
        ([1], {"pad_to": 0.0}, "pad_to is 0.0"),
        ([1], {"pad_to": 1.5}, "pad_to is 1.5"),
        ([1], {"pad_to": "max"}, "pad_to is 'max'"),
    ],
)
def test_errors(tokenizer, lengths, options, message):
    with pytest.raises(AgwmError, match=message):
        encode(split(lengths), tokenizer, **options)


def test_tokenizer_without_padding_token(minilm):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    tokenizer.pad_token = None
    with pytest.raises(AgwmError, match="no padding token"):
        encode(split([1]), tokenizer)
