"""What is in a file that decides how far a score on it can be trusted."""

import datasets

from agwm_jax.data.tasks import Task
from agwm_jax.selection.findings import findings


class Words:
    """A tokenizer of words, of which those in capitals are unknown."""

    unk_token_id = 0

    def __call__(self, *columns, **_):
        rows = zip(*columns, strict=True)
        return {"input_ids": [[0 if word.isupper() else 1 for text in row for word in text.split()] for row in rows]}


def task(texts, labels, names=("no", "yes"), **columns):
    split = datasets.Dataset.from_dict({"text": texts, "label": labels, **columns})
    kind = "classification" if names else "regression"
    return Task("t", kind, names, "text_pair" in columns, ("accuracy",), "validation", {"train": split})


def of(*arguments, max_length=128, folds=5, **columns):
    return findings(task(*arguments, **columns), Words(), max_length=max_length, folds=folds)


def test_even_classes_and_plain_texts_need_few_words():
    found = of([f"text {i} of many" for i in range(40)], [0, 1] * 20)
    assert found == [
        "40 texts of 2 classes: no 20, yes 20.",
        "Always guessing 'no' would be right for 50.0%.",
        "Texts have 4 to 4 tokens, half of them 4 or fewer.",
    ]


def test_rare_and_uneven_classes_are_named():
    found = " ".join(of([f"a b {i}" for i in range(40)], [0] * 37 + [1] * 3))
    assert "Fewer than 10 texts: yes (3). What is learnt of such a class is luck; with fewer than 5 it is not" in found
    assert "The classes are uneven: read macro_f1" in found
    assert "not in every fold" not in " ".join(of([f"a b {i}" for i in range(40)], [0] * 34 + [1] * 6))


def test_the_smallest_class_says_whether_all_folds_have_one():
    found = " ".join(of([f"a b {i}" for i in range(40)], [0] * 31 + [1] * 7 + [2] * 2, ("a", "b", "c")))
    assert "b (7), c (2). What is learnt of such a class is luck; with fewer than 5 it is not in every fold" in found


def test_copies_and_contradictions_are_counted():
    texts = [*(f"a b {i}" for i in range(30)), "A  b 1", "a b 2", "a b 2"]
    found = of(texts, [0, 1] * 15 + [1, 0, 1])
    assert "3 texts repeat another one (case and spaces aside); copies of a text stay in one fold." in found
    assert any(s.startswith("1 texts have more than one label, such as 'a b 2' (no and yes)") for s in found)
    pairs = of(["same"] * 20, [0, 1] * 10, text_pair=[f"other {i}" for i in range(20)])
    assert not any("repeat" in sentence for sentence in pairs)


def test_lengths_unknown_tokens_groups_and_scores():
    found = of(["a " * (i + 1) for i in range(20)], [0, 1] * 10, max_length=16, group=list("abcd" * 5))
    assert "Texts have 1 to 20 tokens, half of them 10 or fewer; 4 (20%) are cut to 16." in found
    assert "4 groups, each of which stays in one fold." in found
    assert any(s.startswith("50% of the tokens are unknown") for s in of(["x Y"] * 10 + ["z Q"] * 10, [0, 1] * 10))
    assert (
        of([f"a {i}" for i in range(4)], [0.5, 1.0, 2.0, 4.5], ())[0] == "4 texts with scores from 0.5 to 4.5, mean 2."
    )
