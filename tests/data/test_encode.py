"""Token arrays: the tokenizer's own ids, one length for a split, nothing cut unseen."""

from functools import partial

import chex
import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

from agwm_jax.data.agreement import agreement_task
from agwm_jax.data.draws import low_resource_rows
from agwm_jax.data.encode import encode, encode_draws
from agwm_jax.data.tasks import LabelScale, Task
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
        np.testing.assert_array_equal(encoded[name], expected[name])
        assert encoded[name].dtype == np.int32
    assert encoded["labels"].tolist() == [2, 0, 1]
    assert encoded["labels"].dtype == np.int32


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
    assert encoded["input_ids"].shape == (3, length)
    assert (report.length, report.truncated, report.longest, report.examples) == (length, truncated, 20, 3)
    tokens = encoded["attention_mask"].sum(axis=1)
    assert tokens.tolist() == [min(n + 2, length) for n in (2, 4, 18)]
    last = encoded["input_ids"][np.arange(3), tokens - 1]
    assert (last == tokenizer.sep_token_id).all()  # a cut text still ends with its special token


def test_the_longer_text_of_a_pair_is_cut(tokenizer):
    data = split([20], text_pair=["dog dog"])
    encoded, report = encode(data, tokenizer, max_length=16)
    words = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0])
    assert words == ["[CLS]", *["cat"] * 11, "[SEP]", "dog", "dog", "[SEP]"]
    assert encoded["token_type_ids"][0].tolist() == [0] * 13 + [1] * 3
    assert report.truncated == 1


def test_regression_labels_are_floats(tokenizer):
    encoded, _ = encode(split([1, 2], label=2.5), tokenizer, kind="regression")
    assert encoded["labels"].dtype == np.float32
    assert encoded["labels"].tolist() == [2.5, 2.5]


def test_no_labels_no_token_types(tokenizer):
    class Plain:
        pad_token_id = 9

        def num_special_tokens_to_add(self, pair):
            return 0

        def __call__(self, texts, **options):
            return {"input_ids": [[7] * len(text.split()) for text in texts]}

    encoded, _ = encode(split([1, 3]).remove_columns("label"), Plain())
    assert list(encoded) == ["attention_mask", "input_ids", "labels"]
    assert encoded["input_ids"].tolist() == [[7] + [9] * 7, [7] * 3 + [9] * 5]
    assert encoded["labels"].tolist() == [0, 0]
    asked, _ = encode(split([1, 3]), Plain(), inputs=("token_type_ids",))
    chex.assert_trees_all_equal(asked["token_type_ids"], np.zeros((2, 8), np.int32))


def test_a_model_asks_for_what_its_tokenizer_gives_on_request_only(tokenizer, minilm):
    quiet = AutoTokenizer.from_pretrained(minilm, model_input_names=["input_ids", "attention_mask"])
    data = split([2, 20], text_pair=["dog", "dog dog"])
    assert "token_type_ids" not in encode(data, quiet, max_length=16)[0]
    chex.assert_trees_all_equal(
        encode(data, quiet, max_length=16, inputs=("token_type_ids",))[0], encode(data, tokenizer, max_length=16)[0]
    )


def a_task(kind="classification", **splits):
    names, metrics = (("a", "b"), ("accuracy",)) if kind == "classification" else ((), ("spearman",))
    return Task("t", kind, names, False, metrics, "validation", splits)


def test_evaluation_splits_share_a_length_and_are_never_cut_by_the_quantile(tokenizer):
    task = a_task(train=split([4] * 9 + [30]), validation=split([2] * 10 + [20]), test=split([50]))
    (draw,) = encode_draws(task, tokenizer, seeds=[0], max_length=48, pad_to=0.9)
    assert draw.task is task
    reports = draw.reports
    lengths = {"validation": 48, "test": 48, "train": 8}
    assert {name: columns["input_ids"].shape[1] for name, columns in draw.encoded.items()} == lengths
    assert {name: report.length for name, report in reports.items()} == lengths
    assert {name: report.truncated for name, report in reports.items()} == {"train": 1, "validation": 0, "test": 1}
    validation = draw.encoded["validation"]
    assert validation["attention_mask"].sum(axis=1).tolist() == [4] * 10 + [22]
    assert (validation["input_ids"][:, 22:] == tokenizer.pad_token_id).all()


def test_a_draw_does_not_depend_on_the_draws_beside_it(tokenizer):
    lengths = [*range(1, 40), 100]
    pool = split(lengths, label=0).remove_columns("label").add_column("label", [i % 2 for i in range(len(lengths))])
    task = a_task(train=pool, validation=split([3, 7]))
    options = {"rows": partial(low_resource_rows, train_size=12), "max_length": 64}
    alone = {seed: encode_draws(task, tokenizer, seeds=[seed], **options)[0] for seed in (0, 2)}
    beside = dict(zip((0, 2), encode_draws(task, tokenizer, seeds=[0, 2], **options), strict=True))
    longest = {seed: draw.reports["train"].longest for seed, draw in alone.items()}
    assert longest[0] != longest[2]  # by its own longest text each would have another length
    for seed in (0, 2):
        chex.assert_trees_all_equal(beside[seed].encoded, alone[seed].encoded)
        assert beside[seed].reports == alone[seed].reports
        assert {report.length for report in alone[seed].reports.values()} == {64}
        own = encode(beside[seed].task.splits["train"], tokenizer, max_length=64)[0]
        width = own["input_ids"].shape[1]
        chex.assert_trees_all_equal(alone[seed].encoded["train"]["input_ids"][:, :width], own["input_ids"])
        assert alone[seed].encoded["development"]["labels"].tolist() == list(
            alone[seed].task.splits["development"]["label"]
        )
    assert beside[0].encoded["validation"]["input_ids"] is beside[2].encoded["validation"]["input_ids"]
    quantile = [encode_draws(task, tokenizer, seeds=[seed], pad_to=0.5, **options)[0] for seed in (0, 2)]
    assert {draw.encoded["train"]["input_ids"].shape for draw in quantile} == {(12, 24)}
    assert {draw.encoded["development"]["input_ids"].shape for draw in quantile} == {(2, 64)}
    cut = [sum(len(text.split()) + 2 > 24 for text in draw.task.splits["train"]["text"]) for draw in quantile]
    assert [draw.reports["train"].truncated for draw in quantile] == cut
    assert all(cut)


def test_scores_are_standardised_by_the_draw_and_undone(tokenizer):
    values = [float(i) for i in range(20)]
    pool = split([3] * 20).remove_columns("label").add_column("label", values)
    task = a_task("regression", train=pool, validation=split([4], label=7.0))
    draws = encode_draws(task, tokenizer, seeds=[0, 1], rows=partial(low_resource_rows, train_size=6))
    assert draws[0].scale != draws[1].scale
    for draw in draws:
        labels = np.array(draw.task.splits["train"]["label"])
        assert draw.scale == LabelScale(pytest.approx(labels.mean()), pytest.approx(labels.std()))
        standard = draw.encoded["train"]["labels"]
        np.testing.assert_allclose([standard.mean(), standard.std()], [0, 1], atol=1e-6)
        for name, columns in draw.encoded.items():
            np.testing.assert_allclose(draw.scale.undo(columns["labels"]), draw.task.splits[name]["label"], rtol=1e-5)


def test_the_sentence_about_cut_texts(tokenizer):
    _, report = encode(split([2, 4, 18, 18]), tokenizer, max_length=16)
    assert report.warning("split train") == (
        "2 of 4 texts of split train (50%) were cut to 16 tokens, the longest has 20: "
        "raise data.max_length or data.pad_to."
    )
    assert encode(split([2]), tokenizer)[1].warning("split train") is None


def test_agreement_sentences_are_short(tokenizer):
    task = agreement_task(train_size=160, validation_size=16, test_size=160)
    (draw,) = encode_draws(task, tokenizer, seeds=[0])
    assert draw.encoded["train"]["input_ids"].shape[1] <= 24
    assert not any(report.truncated for report in draw.reports.values())
    assert not (draw.encoded["train"]["input_ids"] == tokenizer.unk_token_id).any()


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
