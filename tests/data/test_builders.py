"""Why text files are read by hand: what the builders of `datasets` make of them, features given."""

import logging

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from agwm_jax.data.files import read_table
from agwm_jax.data.hub import quietly
from agwm_jax.errors import AgwmError

TEXTS = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("string")})


@pytest.fixture
def built(tmp_path, caplog):
    """What a builder gives for the content of a file, as columns."""
    caplog.set_level(logging.CRITICAL, logger="datasets")

    def built(extension, content, features=TEXTS, **options):
        path = tmp_path / f"data.{extension}"
        path.write_text(content)
        options |= {"cache_dir": tmp_path / "cache", "keep_in_memory": True, "split": "train"}
        with quietly():
            builder = {"jsonl": "json"}.get(extension, extension)
            rows = datasets.load_dataset(builder, data_files=str(path), features=features, **options)
        return rows.to_dict(), read_table(path).columns

    return built


def test_dates_become_timestamps(built):
    theirs, ours = built("jsonl", '{"text": "2024-01-31", "label": "a"}\n{"text": "2024-02-01", "label": "b"}\n')
    assert theirs["text"] == ["2024-01-31 00:00:00", "2024-02-01 00:00:00"]
    assert ours["text"] == ["2024-01-31", "2024-02-01"]


def test_labels_of_two_types_get_quotes(built):
    theirs, ours = built("jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n')
    assert theirs["label"] == ["1", '"x"']
    assert ours["label"] == [1, "x"]


def test_missing_values_are_made(built):
    theirs, ours = built("csv", "text,label\nNA,a\nnull,b\n")
    assert theirs["text"] == [None, None]
    assert ours["text"] == ["NA", "null"]


def test_texts_move_by_one_column(built, tmp_path):
    with pytest.raises(AgwmError, match="line 2: 3 fields, the header has 2"):
        built("csv", "text,label\nred,good,1\nblue,bad,0\n", keep_default_na=False)
    rows = datasets.Dataset.from_csv(str(tmp_path / "data.csv"), features=TEXTS, cache_dir=tmp_path / "other")
    assert rows.to_dict() == {"text": ["good", "bad"], "label": ["1", "0"]}


def test_short_rows_are_filled(built, tmp_path):
    with pytest.raises(AgwmError, match="line 3: 1 fields, the header has 2"):
        built("csv", "text,label\none,1\ntwo\n")
    rows = datasets.Dataset.from_csv(str(tmp_path / "data.csv"), features=TEXTS, cache_dir=tmp_path / "other")
    assert rows.to_dict()["label"] == ["1", None]


def test_a_bad_line_has_no_number(built, tmp_path):
    with pytest.raises(datasets.exceptions.DatasetGenerationError) as caught:
        built("jsonl", '{"text": "a", "label": "1"}\n\n{"text": }\n')
    assert "3" not in f"{caught.value} {caught.value.__cause__}"
    with pytest.raises(AgwmError, match="line 3: not valid JSON"):
        read_table(tmp_path / "data.jsonl")


def test_the_name_of_a_parquet_file_is_a_pattern_and_an_empty_one_is_damaged(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL, logger="datasets")
    path = tmp_path / "run[1].parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match="data_files are invalid"):
        datasets.Dataset.from_parquet(str(path), cache_dir=tmp_path / "cache")
    assert read_table(path).columns == {"text": ["a"]}
    empty = tmp_path / "empty.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), empty)
    with quietly(), pytest.raises(datasets.exceptions.DatasetGenerationError):
        datasets.Dataset.from_parquet(str(empty), cache_dir=tmp_path / "cache")
    with pytest.raises(AgwmError, match="has no rows"):
        read_table(empty)
