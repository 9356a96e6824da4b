"""Tables in files: what is read is what was written, and every bad file is named with its line."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from agwm_jax.data.files import read_table, write_table
from agwm_jax.data.predictions import read_texts, write_predictions
from agwm_jax.errors import AgwmError

# Texts that other readers change: missing values, dates, quotes, line ends that are none in JSON Lines, spaces.
TEXTS = ["NA", "null", "2024-01-31", 'she said "no, thanks"', " two  spaces ", "007", "naïve 日本", "nan", "é,;|"]
ODD = ["next\u2028line", "form\x0cfeed", "unit\x1fseparator", "next\x85line"]


def parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv", "parquet", "ndjson", "json", "CSV"])
def test_texts_come_back_as_they_were(tmp_path, extension):
    path = tmp_path / f"texts.{extension}"
    texts = TEXTS + (ODD if extension != "CSV" else [])
    write_table(path, {"text": texts, "number": list(range(len(texts)))})
    table = read_table(path)
    assert table.columns["text"] == texts
    assert [int(value) for value in table.columns["number"]] == list(range(len(texts)))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_csv_holds_line_ends_and_tsv_says_it_cannot(tmp_path):
    write_table(tmp_path / "a.csv", {"text": ["two\nlines", "carriage\r\nreturn"]})
    table = read_table(tmp_path / "a.csv")
    assert table.columns["text"] == ["two\nlines", "carriage\r\nreturn"]
    assert list(table.numbers) == [2, 4]
    with pytest.raises(AgwmError, match="TSV file cannot hold a tab or a line end"):
        write_table(tmp_path / "a.tsv", {"text": ["two\nlines"]})
    assert not (tmp_path / "a.tsv").exists()


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        path = tmp_path / name
        path.write_bytes(f"\ufefftext{separator}label\r\none{separator}1\r\n\r\n".encode())
        assert read_table(path).columns == {"text": ["one"], "label": ["1"]}


def test_quotes_in_tsv_are_text(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"open\t1\nshe "said"\t0\n')
    assert read_table(path).columns["text"] == ['"open', 'she "said"']


def test_long_text(tmp_path):
    write_table(tmp_path / "a.csv", {"text": ["x" * 200_000]})
    assert len(read_table(tmp_path / "a.csv").columns["text"][0]) == 200_000


def test_parquet_names_its_classes(tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").class_names == {"label": ("bad", "good")}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.csv", b" \n\n", "a.csv is empty"),
        ("a.csv", b"text,label\n", "header and no rows"),
        ("a.csv", b",,,\na,b,,\n", "a.csv: the header names no column"),
        ("a.txt", b"text", r"extension '.txt' is none of \.jsonl"),
        ("a", b"text", "extension '' is none of"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "a.jsonl, line 2: byte 0xff is not UTF-8"),
        ("a.csv", "text\nx".encode("utf-16"), "a.csv is UTF-16"),
        ("a.jsonl", b'{"a": 1}\n\n{"a": }\n', "a.jsonl, line 3: not valid JSON"),
        ("a.json", b'[{"a": 1}]', "a.json, line 1: a JSON list, one JSON object a line"),
        ("a.csv", b"text,label\none,1\ntwo\n", r"a.csv, line 3: 1 fields, the header has 2 \('text', 'label'\)"),
        ("a.tsv", b"text\tlabel\none\t1\t2\n", "a.tsv, line 2: 3 fields"),
        ("a.csv", b'text,label\none,1\n"two,1\nx,1\n', "a.csv, line 3: not valid CSV"),
        ("a.csv", b"text,label,text\none,1,2\n", "names the column 'text' more than once"),
        ("a.parquet", b"not parquet at all", "a.parquet is not a Parquet file, or is damaged"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AgwmError, match=message):
        read_table(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_missing_file_and_folder(tmp_path, name):
    with pytest.raises(AgwmError, match=rf"There is no file .*{name}"):
        read_table(tmp_path / name)
    (tmp_path / name).mkdir()
    with pytest.raises(AgwmError, match="is a folder"):
        read_table(tmp_path / name)


def test_empty_and_truncated_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"text": pyarrow.array([], pyarrow.string())})
    with pytest.raises(AgwmError, match="has no rows"):
        read_table(path)
    path = parquet(tmp_path / "b.parquet", {"text": ["a", "b"]})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(AgwmError, match="damaged"):
        read_table(path)


@pytest.mark.parametrize("source", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("target", ["jsonl", "csv", "tsv", "parquet"])
def test_predictions_keep_the_columns(tmp_path, source, target):
    columns = {"id": [3, 1, 2], "sentence": ["one", "two", "three"], "note": ["x", "y", "z"]}
    write_table(tmp_path / f"in.{source}", columns)
    texts = read_texts(tmp_path / f"in.{source}", text_columns=("sentence",))
    assert texts.split.to_dict() == {"text": columns["sentence"]}
    write_predictions(
        tmp_path / f"out.{target}",
        texts,
        predictions=["bad", "good", "good"],
        probabilities=[[0.75, 0.25], [0.5, 0.5], [0.0, 1.0]],
        label_names=("bad", "good"),
    )
    got = read_table(tmp_path / f"out.{target}").columns
    assert list(got) == ["id", "sentence", "note", "prediction", "probability_bad", "probability_good"]
    assert [int(value) for value in got["id"]] == [3, 1, 2]
    assert got["prediction"] == ["bad", "good", "good"]
    assert [float(value) for value in got["probability_good"]] == [0.25, 0.5, 1.0]


def test_regression_predictions_of_pairs(tmp_path):
    write_table(tmp_path / "in.jsonl", {"a": ["one"], "b": ["two"], "more": [{"nested": [1]}]})
    texts = read_texts(tmp_path / "in.jsonl", text_columns=("a", "b"))
    assert texts.split.to_dict() == {"text": ["one"], "text_pair": ["two"]}
    write_predictions(tmp_path / "out.jsonl", texts, predictions=[2.5])
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row == {"a": "one", "b": "two", "more": {"nested": [1]}, "prediction": 2.5}


def test_predictions_never_overwrite_a_column(tmp_path):
    write_table(tmp_path / "in.jsonl", {"text": ["one"], "prediction": ["mine"]})
    texts = read_texts(tmp_path / "in.jsonl", text_columns=("text",))
    with pytest.raises(AgwmError, match="already have the column 'prediction'"):
        write_predictions(tmp_path / "out.jsonl", texts, predictions=[1.0])
    assert not (tmp_path / "out.jsonl").exists()


def test_no_folder_to_write_to(tmp_path):
    with pytest.raises(AgwmError, match="cannot be written: No such file or directory"):
        write_table(tmp_path / "missing" / "out.jsonl", {"a": [1]})


def test_nothing_is_left_of_a_failed_write(tmp_path):
    (tmp_path / "out.jsonl").mkdir()  # a file cannot take its place
    with pytest.raises(AgwmError, match="cannot be written"):
        write_table(tmp_path / "out.jsonl", {"a": [1]})
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ('{"text": "a"}\n{"text": null}\n', "text", "line 2: no text in column 'text'"),
        ('{"text": "a"}\n{"other": "b"}\n', "text", "line 2: no text in column 'text'"),
        ('{"text": "a"}\n{"text": 5}\n', "text", "line 2: column 'text' holds 5, a text was expected"),
        ('{"text": "\\ud83d"}\n', "text", "line 1: column 'text' holds half of a character"),
        (
            '{"sentence": "a"}\n',
            "sentense",
            "no column 'sentense': its columns are 'sentence'; did you mean 'sentence'",
        ),
    ],
)
def test_bad_texts(tmp_path, content, columns, message):
    (tmp_path / "in.jsonl").write_text(content)
    with pytest.raises(AgwmError, match=message):
        read_texts(tmp_path / "in.jsonl", text_columns=(columns,))
