"""Files that went wrong in practice: what a sensible user expects of each, by small invented twins of them.

Where the folder of the original cases lies beside the repository, they are read too.
"""

import json
import re
import unicodedata
from pathlib import Path

import pytest

from agwm_jax.data.columns import read_labelled
from agwm_jax.data.predictions import read_texts
from agwm_jax.data.sources.local import LocalTask
from agwm_jax.errors import AgwmError

CASES = Path(__file__).parents[2].parent / "shared" / "cases"


@pytest.fixture
def load(tmp_path):
    """``load(train, validation, **options)`` of two files' contents: a text or rows for .csv, objects for .jsonl."""

    def written(name, rows):
        if isinstance(rows, str):
            path, text = tmp_path / f"{name}.csv", rows
        elif isinstance(rows[0], dict):
            path, text = tmp_path / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows)
        else:
            path = tmp_path / f"{name}.csv"
            text = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
        path.write_text(text)
        return str(path)

    def load(train, validation, **options):
        files = {"train": written("train", train), "validation": written("validation", validation)}
        return LocalTask(files=files, **options).load()

    return load


def rows(*labels):
    return [(f"text {index}", label) for index, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["0110", "0220", "0305"], ["0110", "0220", "0305"]),
        (["1_1", "1_2", "11", "12"], ["11", "12", "1_1", "1_2"]),
        (["10", "2", "02"], ["02", "2", "10"]),
        (["1.0", "1", "1e0"], ["1", "1.0", "1e0"]),
        (["inf", "nan", "NA", "null"], ["NA", "inf", "nan", "null"]),
        (["٣", "3"], ["3", "٣"]),  # int() takes digits of other scripts
        (["True", "False"], ["False", "True"]),
    ],
)
def test_a_label_without_a_type_is_the_text_that_stands_there(load, labels, names):
    task = load(rows(*labels), rows(*labels))
    assert list(task.label_names) == names
    for split in task.splits.values():
        assert [task.label_names[index] for index in split["label"]] == labels


@pytest.mark.parametrize("names", [None, [True, False], ["False", "True"]])
def test_booleans_are_one_pair_of_classes(load, tmp_path, names):
    typed = [{"text": f"text {i}", "label": i % 2 == 0} for i in range(4)]
    task = load(typed, typed, label_names=names)
    first = "true" if names == [True, False] else "false"
    assert [name.lower() for name in task.label_names] == [first, "true" if first == "false" else "false"]
    expected = [task.label_names.index(name) for name in task.label_names for _ in range(2)]
    (tmp_path / "later.csv").write_text(
        "".join(["text,label\n", *(f"a,{n.title()}\nb,{n}\n" for n in task.label_names)])
    )
    later = read_labelled(tmp_path / "later.csv", task, text_columns=("text",))
    assert list(later["label"]) == expected
    back = load(rows("True", "False"), typed)  # and the other way round
    assert [back.label_names[index] for index in back.splits["validation"]["label"]] == ["True", "False"] * 2


def test_many_decimals_hint_at_a_regression(load):
    labels = [f"{index}.{index % 7}" for index in range(15)]
    with pytest.raises(
        AgwmError, match=r"'9.75' is none of the 15 classes .*; these are decimal.* task.kind to regression"
    ):
        load(rows(*labels), rows("9.75"))
    with pytest.warns(UserWarning, match=r"train.csv: 15 classes; these are decimal numbers: set task.kind"):
        load(rows(*labels), rows(labels[3]))
    assert load(rows(*labels), rows("9.75"), kind="regression").splits["validation"]["label"][0] == 9.75
    load(rows(*labels), rows(labels[3]), label_names=labels)  # whoever lists them means classes


@pytest.mark.parametrize("labels", [[f"{i}" for i in range(15)], ["1.1", "1.2", "2.1"]])
def test_codes_are_no_scores(load, labels):
    assert len(load(rows(*labels), rows(labels[0])).label_names) == len(labels)


def test_a_header_amid_the_rows(load):
    with pytest.raises(AgwmError, match=r"train.csv, line 4: the header again; are these two files in one"):
        load("text,label\na,x\nb,y\ntext,label\nc,x\n", rows("x"))
    assert load("text,label\nlabel,x\ntext,y\n", rows("x")).splits["train"]["text"][:] == ["label", "text"]


def test_columns_without_a_name_are_left_out(load, tmp_path):
    text = "label,text,,,\nham,one,,,\nspam,two,,left over,\n"
    task = load(text, text)
    assert task.splits["train"].to_dict() == {"text": ["one", "two"], "label": [0, 1]}
    texts = read_texts(tmp_path / "train.csv", text_columns=("text",))
    assert texts.columns == {"label": ["ham", "spam"], "text": ["one", "two"]}
    assert load("text,label\none,ham,,\ntwo,spam,,\n", text).splits["train"].to_dict() == task.splits["train"].to_dict()
    with pytest.raises(AgwmError, match="line 2: 3 fields, the header has 2"):
        load("text,label\none,ham,more\n", text)
    with pytest.raises(AgwmError, match="line 3: 1 fields, the header has 5"):
        load("label,text,,,\nham,one,,,\nspam\n", text)


def test_row_numbers_of_pandas_are_kept(tmp_path):
    (tmp_path / "a.csv").write_text(",text\n7,one\n9,two\n")
    assert read_texts(tmp_path / "a.csv", text_columns=("text",)).columns == {"": ["7", "9"], "text": ["one", "two"]}


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"text": {str(i): "one" for i in range(500)}, "label": {str(i): i for i in range(500)}}),
        json.dumps([{"text": "one", "label": 1}] * 500),
        json.dumps([{"text": "one", "label": 1}] * 500, indent=2),
        json.dumps({"columns": ["text", "label"], "data": [["one", 1]] * 500}),
    ],
)
def test_json_of_pandas(tmp_path, text):
    (tmp_path / "train.json").write_text(text)
    files = {"train": str(tmp_path / "train.json"), "validation": str(tmp_path / "dev.json")}
    with pytest.raises(AgwmError, match=r'to_json\(path, orient="records", lines=True\)') as caught:
        LocalTask(files=files).load()
    assert len(str(caught.value)) < 500


def test_no_sentence_is_longer_than_a_screen(load):
    long = "x" * 5000
    names = [f"{long} {i}" for i in range(300)]
    for train, validation, options in [
        ([{"text": [long] * 90, "label": 1}], rows("x"), {}),
        ([{"text": "a", "label": [long] * 90}], rows("x"), {}),
        (rows(*names), rows(long), {}),
        (rows(*names[:1] * 3), rows(long), {}),
        (f"{','.join(names)}\n{'a,' * 299}a\n", rows("x"), {}),
        (f"{','.join(names)}\na,b\n", rows("x"), {}),
        (f"{';'.join(names)}\na;b\n", rows("x"), {}),
        (rows("1.5", long), rows("2"), {"kind": "regression"}),
    ]:
        with pytest.raises(AgwmError) as caught:
            load(train, validation, **options)
        assert len(str(caught.value)) < 500 + len(str(CASES)), str(caught.value)


def test_classes_that_differ_in_spaces_or_case_alone(load):
    with pytest.warns(UserWarning, match="differ in spaces") as caught:
        task = load(rows("good", "bad ", "bad", "Good", "so so"), rows("bad"))
    assert len(task.label_names) == 5
    sentences = [str(each.message) for each in caught]
    assert len(sentences) == 2
    assert "train.csv: the classes 'bad', 'bad ' differ in spaces or case alone" in sentences[1] + sentences[0]
    assert "train.csv: the classes 'Good', 'good' differ in spaces or case alone" in sentences[1] + sentences[0]
    with pytest.raises(AgwmError, match=r"the label ' bad' is none of .*; 'bad' differs in spaces or case alone"):
        load(rows("good", "bad"), rows(" bad"))


@pytest.mark.parametrize(
    ("mark", "remedy"), [(";", "set task.separator to ';'"), ("|", "separator to '|'"), ("\t", "as .tsv")]
)
def test_another_separator(load, mark, remedy):
    text = f"text{mark}label\none, and more{mark}a\ntwo{mark}b\n"
    with pytest.raises(AgwmError, match=f"looks separated by .*, not by ','; .*{re.escape(remedy)}"):
        load(text, text)
    task = load(text, text, separator=mark)
    assert task.splits["train"].to_dict() == {"text": ["one, and more", "two"], "label": [0, 1]}


def test_a_tsv_that_is_none(tmp_path):
    (tmp_path / "a.tsv").write_text("text,label\none,1\n")
    with pytest.raises(AgwmError, match=r"looks separated by ',', not by a tab; save it as \.csv\.$"):
        read_texts(tmp_path / "a.tsv", text_columns=("text",))


def test_unicode_forms_are_one(load):
    one, other = (unicodedata.normalize(form, "négatif") for form in ("NFC", "NFD"))
    assert one != other
    task = load(rows(other, "positif", one), rows(one))
    assert task.label_names == (other, "positif")  # as it stands in the file
    assert list(task.splits["train"]["label"]) == [0, 1, 0]
    assert list(load(rows(other, "positif"), rows(one), label_names=["positif", one]).splits["train"]["label"]) == [
        1,
        0,
    ]
    text = f"{other},label\na,x\nb,y\n"
    grouped = load(text, text, text_columns=[one], group_column=one)
    assert grouped.splits["train"].to_dict() == {"text": ["a", "b"], "label": [0, 1], "group": ["a", "b"]}


def test_parquet_numbers_of_named_classes_are_never_names(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2"])})
    for split in ("train", "validation"):
        rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
        rows.to_parquet(tmp_path / f"{split}.parquet")
    source = LocalTask(files={split: str(tmp_path / f"{split}.parquet") for split in ("train", "validation")})
    assert list(source.load().splits["train"]["label"]) == [0, 1]
    turned = source.model_copy(update={"label_names": ("2", "1")})
    assert list(turned.load().splits["train"]["label"]) == [1, 0]
    renamed = source.model_copy(update={"label_names": ("low", "high")})
    assert list(renamed.load().splits["train"]["label"]) == [0, 1]


# The original cases

SPREADSHEET = {"text_columns": ("v2",), "label_column": "v1"}


@pytest.mark.parametrize(
    ("case", "train", "validation", "options", "right"),
    [
        ("01-leading-zero-codes", "train.csv", "dev.csv", {}, ("0110", "0220", "0305")),
        ("02-underscore-codes", "train.csv", "dev.csv", {}, ("11", "12", "1_1", "1_2")),
        ("04-bool-labels", "train.jsonl", "dev.jsonl", {}, ("false", "true")),
        ("04-bool-labels", "train.jsonl", "later.csv", {}, ("false", "true")),
        ("05-scores-without-kind", "train.csv", "dev.csv", {}, "set task.kind to regression"),
        ("05-scores-without-kind", "train.csv", "dev.csv", {"kind": "regression"}, ()),
        ("06-two-files-in-one", "train.csv", "dev.csv", {}, "the header again"),
        ("07-spreadsheet-trailing-commas", "train.csv", "dev.csv", SPREADSHEET, "is not UTF-8"),
        ("07-spreadsheet-trailing-commas", "train-utf8.csv", "dev-utf8.csv", SPREADSHEET, ("ham", "spam")),
        ("08-pandas-to-json", "train.json", "dev.json", {}, "lines=True"),
        ("28-labels-with-spaces", "train-space.csv", "dev.csv", {}, "did you mean ' label'"),
    ],
)
def test_the_original_cases(case, train, validation, options, right):
    if not CASES.is_dir():
        pytest.skip(f"no {CASES}")
    source = LocalTask(
        files={"train": str(CASES / case / train), "validation": str(CASES / case / validation)}, **options
    )
    if isinstance(right, tuple):
        assert source.load().label_names == right
        return
    with pytest.raises(AgwmError, match=re.escape(right)) as caught:
        source.load()
    assert len(str(caught.value)) < 500


def test_the_original_case_of_spaces():
    if not CASES.is_dir():
        pytest.skip(f"no {CASES}")
    folder = CASES / "28-labels-with-spaces"
    with pytest.warns(UserWarning, match="differ in spaces or case alone") as caught:
        LocalTask(files={"train": str(folder / "train.csv"), "validation": str(folder / "dev.csv")}).load()
    sentences = " ".join(str(each.message) for each in caught)
    assert "'bad', 'bad '" in sentences
    assert "'good', 'good '" in sentences
