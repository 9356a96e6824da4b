"""Tasks from files and hub data sets, their draws, and a clear sentence for every label or column that does not fit."""

import math
import os
from collections import Counter

import datasets
import pytest

from agwm_jax.data import tasks
from agwm_jax.data.agreement import agreement_task
from agwm_jax.data.files import write_table
from agwm_jax.data.tasks import drop_leaked, glue_task, hub_task, local_task, low_resource, read_labelled
from agwm_jax.errors import AgwmError


def write(folder, extension="jsonl", **splits):
    """Files of single texts, from the labels of each split."""
    files = {}
    for split, labels in splits.items():
        files[split] = folder / f"{split}.{extension}"
        write_table(files[split], {"text": [f"{split} {i}" for i in range(len(labels))], "label": list(labels)})
    return files


@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv", "parquet"])
def test_local_formats(tmp_path, extension):
    files = write(tmp_path, extension, train=[0, 1, 1], validation=[1, 0], test=[1, 1])
    task = local_task(files, text_columns="text")
    assert task.label_names == ("0", "1")
    assert (task.kind, task.pair, task.metrics, task.report_split) == (
        "classification",
        False,
        ("accuracy", "macro_f1"),
        "test",
    )
    assert task.splits["train"].to_dict() == {"text": ["train 0", "train 1", "train 2"], "label": [0, 1, 1]}
    assert list(task.splits["test"]["label"]) == [1, 1]


@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv", "parquet"])
def test_local_regression(tmp_path, extension):
    files = write(tmp_path, extension, train=[0.5, 5.0], validation=[2.25])
    task = local_task(files, text_columns="text", kind="regression")
    assert (task.label_names, task.metrics, task.report_split) == ((), ("spearman", "pearson"), "validation")
    assert list(task.splits["train"]["label"]) == [0.5, 5.0]


@pytest.mark.parametrize(
    ("labels", "names", "expected_names", "expected"),
    [
        (["no", "yes", "maybe"], None, ("maybe", "no", "yes"), [1, 2, 0]),
        (["no", "yes", "maybe"], ("yes", "no", "maybe"), ("yes", "no", "maybe"), [1, 0, 2]),
        ([0, 1, 1], ("bad", "good"), ("bad", "good"), [0, 1, 1]),
        (["0", "1", "1"], ("bad", "good"), ("bad", "good"), [0, 1, 1]),
        ([-1, 10, 2], None, ("-1", "2", "10"), [0, 2, 1]),
        ([1, 2, 1], ("1", "2"), ("1", "2"), [0, 1, 0]),  # a name, not a position
        ([1, 0, 1], ("1", "0"), ("1", "0"), [0, 1, 0]),
        ([1.0, 2.0, 1.0], None, ("1", "2"), [0, 1, 0]),
        ([True, False, True], None, ("0", "1"), [1, 0, 1]),
    ],
)
def test_label_mapping(tmp_path, labels, names, expected_names, expected):
    task = local_task(write(tmp_path, train=labels, validation=labels), text_columns="text", label_names=names)
    assert task.label_names == expected_names
    assert list(task.splits["train"]["label"]) == list(task.splits["validation"]["label"]) == expected


def test_pairs_and_groups(tmp_path):
    path = tmp_path / "a.jsonl"
    write_table(path, {"q": ["a", "b"], "s": ["c", "d"], "gold": ["x", "y"], "kind": ["k", 3]})
    (tmp_path / "b.jsonl").write_bytes(path.read_bytes())
    files = {"train": path, "validation": tmp_path / "b.jsonl"}
    task = local_task(files, text_columns=("q", "s"), label_column="gold", group_column="kind", metrics=("matthews",))
    assert task.pair
    assert task.metrics == ("matthews",)
    columns = {"text": ["a", "b"], "text_pair": ["c", "d"], "label": [0, 1], "group": ["k", "3"]}
    assert task.splits["validation"].to_dict() == columns


def test_an_edited_file_is_read_anew(tmp_path):
    files = write(tmp_path, train=[0, 1], validation=[0, 1])
    before = files["train"].stat()
    assert list(local_task(files, text_columns="text").splits["train"]["label"]) == [0, 1]
    files["train"].write_text(files["train"].read_text().replace("train 0", "TRAIN 0"))
    os.utime(
        files["train"], ns=(before.st_atime_ns, before.st_mtime_ns)
    )  # same size, same time: a cache would be stale
    assert local_task(files, text_columns="text").splits["train"]["text"][0] == "TRAIN 0"


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        (
            {"train": [0, 1], "validation": [0, 2]},
            {},
            r"validation.jsonl, line 2: the label 2 is none of the 2 classes \(0, 1",
        ),
        ({"train": ["a", "b"], "validation": ["c"]}, {}, "line 1: the label 'c' is none of"),
        ({"train": ["a", "b"], "validation": ["a"]}, {"label_names": ("a", "c")}, "train.jsonl, line 2: the label 'b'"),
        ({"train": [0, 2], "validation": [0]}, {"label_names": ("a", "b")}, "train.jsonl, line 2: the label 2"),
        ({"train": [0, -1], "validation": [0]}, {"label_names": ("a", "b")}, "train.jsonl, line 2: the label -1"),
        ({"train": [1, 2], "validation": [3]}, {"label_names": ("1", "2")}, "the label 3 is none of"),
        ({"train": [0, 1], "validation": [0]}, {"label_names": ("a", "a")}, "label_names holds a name twice"),
        ({"train": [1, 1], "validation": [1]}, {}, "all 2 training rows are of the class '1'"),
        ({"train": [0, None], "validation": [0]}, {}, "train.jsonl, line 2: no label in column 'label'"),
        ({"train": [0, [1]], "validation": [0]}, {}, r"line 2: the label is \[1\]"),
        ({"train": [0, 1]}, {}, "has no 'validation' split: it has train"),
        ({"train": [0, 1], "validation": [0]}, {"report_split": "test"}, "has no 'test' split"),
        ({"train": [0, 1], "validation": [0]}, {"report_split": "train"}, "would mean nothing"),
        ({"validation": [0, 1]}, {}, "has no 'train' split"),
        ({"train": [0, 1], "validation": [0]}, {"kind": "ranking"}, "kind is 'ranking'"),
        ({"train": [0, 1], "validation": [0]}, {"label_column": "lable"}, "no column 'lable'.*did you mean 'label'"),
        ({"train": [0, 1], "validation": [0]}, {"group_column": "genre"}, "no column 'genre': its columns are 'text'"),
        ({"train": [0.5, math.nan], "validation": [1]}, {"kind": "regression"}, "line 2: no label"),
        (
            {"train": [0.5, math.inf], "validation": [1]},
            {"kind": "regression"},
            "line 2: the label inf is not a finite",
        ),
        (
            {"train": [0.5, "high"], "validation": [1]},
            {"kind": "regression"},
            "line 2: the label 'high' is not a finite",
        ),
        ({"train": [0.5, "nan"], "validation": [1]}, {"kind": "regression"}, "line 2: the label 'nan' is not a finite"),
        ({"train": [2.0, 2.0], "validation": [1]}, {"kind": "regression"}, "all 2 training labels are 2.0"),
    ],
)
def test_bad_tasks(tmp_path, splits, options, message):
    with pytest.raises(AgwmError, match=message):
        local_task(write(tmp_path, **splits), **{"text_columns": "text", **options})


def test_empty_csv_fields_are_missing(tmp_path):
    files = write(tmp_path, "csv", train=[0, 1], validation=[0, 1])
    files["train"].write_text("text,label\na,0\n,1\n")
    with pytest.raises(AgwmError, match=r"train\.csv, line 3: no text in column 'text'"):
        local_task(files, text_columns="text")
    files["train"].write_text("text,label\na,\nb,1\n")
    with pytest.raises(AgwmError, match=r"train\.csv, line 2: no label"):
        local_task(files, text_columns="text")


def test_two_splits_in_one_file(tmp_path):
    files = write(tmp_path, train=[0, 1])
    (tmp_path / "link.jsonl").symlink_to(files["train"])
    for other in (files["train"], tmp_path / "link.jsonl", tmp_path / "." / "train.jsonl"):
        with pytest.raises(AgwmError, match="'train' and 'test' are the same file"):
            local_task({**files, "test": other}, text_columns="text")


def test_read_labelled_uses_the_classes_of_the_task(tmp_path):
    task = local_task(write(tmp_path, train=["b", "a", "c"], validation=["a"]), text_columns="text")
    write_table(tmp_path / "new.csv", {"text": ["x", "y"], "label": ["c", "c"]})
    split = read_labelled(tmp_path / "new.csv", task, text_columns=("text",), label_column="label")
    assert split.to_dict() == {"text": ["x", "y"], "label": [2, 2]}
    write_table(tmp_path / "new.csv", {"text": ["x"], "label": ["d"]})
    with pytest.raises(AgwmError, match="the label 'd' is none of"):
        read_labelled(tmp_path / "new.csv", task, text_columns=("text",), label_column="label")


# Draws


def test_low_resource_draw():
    task = agreement_task(train_size=400, validation_size=16, test_size=16)
    draw = low_resource(task, train_size=300, seed=3)
    train, development = draw.splits["train"]["text"], draw.splits["development"]["text"]
    assert (len(train), len(development)) == (300, 50)
    assert len({*train, *development}) == 350
    assert {*train, *development} <= set(task.splits["train"]["text"])
    assert draw.splits["test"] is task.splits["test"]
    assert list(low_resource(task, train_size=300, seed=3).splits["train"]["text"]) == list(train)
    assert set(low_resource(task, train_size=300, seed=4).splits["train"]["text"]) != set(train)


def test_low_resource_too_large(tmp_path):
    task = agreement_task(train_size=350, validation_size=16, test_size=16)
    assert len(low_resource(task, train_size=300, seed=0).splits["development"]) == 50
    with pytest.raises(
        AgwmError, match=r"train_size 301 .* development split of 50 need 351 .* has 350: give train_size 300"
    ):
        low_resource(task, train_size=301, seed=0)
    with pytest.raises(AgwmError, match="train_size is 0"):
        low_resource(task, train_size=0, seed=0)
    one_sided = local_task(write(tmp_path, train=[0] * 99 + [1], validation=[0]), text_columns="text")
    with pytest.raises(AgwmError, match=r"draw of 2 training examples by seed 0.*class '0'"):
        low_resource(one_sided, train_size=2, seed=0)


def test_drop_leaked(tmp_path):
    for split, texts in {"train": ["A  b", "c", "d", "e"], "validation": ["a b"], "test": ["D "]}.items():
        write_table(tmp_path / f"{split}.jsonl", {"text": texts, "label": [0, 1, 0, 0][: len(texts)]})
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation", "test")}
    task = local_task(files, text_columns="text")
    assert list(drop_leaked(task).splits["train"]["text"]) == ["c", "e"]
    assert list(drop_leaked(task).splits["test"]["text"]) == ["D "]
    everything = task._replace(splits={**task.splits, "test": task.splits["train"]})
    with pytest.raises(AgwmError, match="nothing is left"):
        drop_leaked(everything)


def test_a_pair_leaks_only_as_a_pair(tmp_path):
    for split, second in {"train": ["x", "y", "z"], "validation": ["X", "w", "w"]}.items():
        write_table(tmp_path / f"{split}.jsonl", {"a": ["a"] * 3, "b": second, "label": [0, 1, 0]})
    files = {split: tmp_path / f"{split}.jsonl" for split in ("train", "validation")}
    assert list(drop_leaked(local_task(files, text_columns=("a", "b"))).splits["train"]["text_pair"]) == ["y", "z"]


# Real data


@pytest.mark.parametrize(
    ("name", "text_columns", "kind", "sizes"),
    [
        ("cola", "sentence", "classification", {"train": 8551, "validation": 1043}),
        ("rte", ("sentence1", "sentence2"), "classification", {"train": 2490, "validation": 277}),
        ("stsb", ("sentence1", "sentence2"), "regression", {"train": 5749, "validation": 1500, "test": 1379}),
        ("citation_intent", "sentence", "classification", {"train": 1688, "validation": 114, "test": 139}),
    ],
)
def test_shared_data(shared_data, name, text_columns, kind, sizes):
    files = {split: shared_data / name / f"{split}.jsonl" for split in sizes}
    task = local_task(files, text_columns=text_columns, kind=kind)
    assert {split: len(rows) for split, rows in task.splits.items()} == sizes
    labels = list(task.splits["train"]["label"])
    if name == "cola":
        assert Counter(labels) == {0: 2528, 1: 6023}
    if name == "stsb":
        assert (min(labels), max(labels), round(sum(labels) / len(labels), 2)) == (0.0, 5.0, 2.7)
    if name == "citation_intent":
        kept = Counter(drop_leaked(task).splits["train"]["label"])
        assert [kept[label] for label in range(6)] == [754, 283, 60, 52, 67, 304]


# Hub data sets


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A local folder in the layout of the hub, and a cache of its own that must stay empty."""
    folder, cache = tmp_path / "reviews", tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    features = datasets.Features(
        {"review": datasets.Value("string"), "stars": datasets.ClassLabel(names=["bad", "good"])}
    )
    for split, labels in {"train": [0, 1, 1], "validation": [1, 0], "test": [-1, -1]}.items():
        rows = {"review": [f"{split} {i}" for i in range(len(labels))], "stars": labels}
        data = datasets.Dataset.from_dict(rows, features=features)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def test_hub_layout(hub_folder, tmp_path):
    task = hub_task(hub_folder, text_columns="review", label_column="stars")
    assert task.label_names == ("bad", "good")
    assert list(task.splits) == ["train", "validation"]  # the labels of its test split are secret
    assert task.splits["train"].to_dict() == {"text": ["train 0", "train 1", "train 2"], "label": [0, 1, 1]}
    assert task.report_split == "validation"
    assert not list((tmp_path / "cache").iterdir())
    mapped = hub_task(
        hub_folder, text_columns="review", label_column="stars", splits={"train": "train", "test": "validation"}
    )
    assert (list(mapped.splits), mapped.report_split) == (["train", "test"], "test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_columns": "reviews"}, "split train has no column 'reviews'.*did you mean 'review'"),
        ({"splits": {"train": "train", "test": "dev"}}, "has no split 'dev': its splits are train, validation, test"),
        ({"splits": {"train": "train", "test": "test"}}, "split test, row 1: the label -1 is none of the 2 classes"),
        ({"name": "large"}, "cannot be loaded: .*large"),
    ],
)
def test_bad_hub_tasks(hub_folder, options, message):
    with pytest.raises(AgwmError, match=message):
        hub_task(hub_folder, **{"text_columns": "review", "label_column": "stars", **options})


def test_no_network():
    assert datasets.config.HF_HUB_OFFLINE  # tests/conftest.py
    with pytest.raises(
        AgwmError, match=r"nyu-mll/glue \(cola\) is not in the local cache and the hub cannot be reached"
    ):
        glue_task("cola")


def test_unknown_glue_task():
    with pytest.raises(AgwmError, match="'cloa' is not a GLUE task: there are cola, sst2"):
        glue_task("cloa")


GLUE = {
    "cola": (("sentence",), 2, "matthews"),
    "sst2": (("sentence",), 2, "accuracy"),
    "mrpc": (("sentence1", "sentence2"), 2, "f1"),
    "stsb": (("sentence1", "sentence2"), 0, "spearman"),
    "qqp": (("question1", "question2"), 2, "f1"),
    "mnli": (("premise", "hypothesis"), 3, "accuracy"),
    "qnli": (("question", "sentence"), 2, "accuracy"),
    "rte": (("sentence1", "sentence2"), 2, "accuracy"),
    "wnli": (("sentence1", "sentence2"), 2, "accuracy"),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_columns_as_on_the_hub(name, monkeypatch):
    text_columns, num_classes, metric = GLUE[name]

    def load_dataset(path, config, **options):
        assert (path, config) == ("nyu-mll/glue", name)
        label = datasets.ClassLabel(num_classes) if num_classes else datasets.Value("float32")
        features = {
            **dict.fromkeys(text_columns, datasets.Value("string")),
            "label": label,
            "idx": datasets.Value("int32"),
        }
        labels = list(range(num_classes)) or [0.5, 4.5]

        def split(name):
            texts = {column: [f"{column} of {name}"] * len(labels) for column in text_columns}
            rows = {**texts, "label": [-1] * len(labels) if name == "test" else labels, "idx": [0] * len(labels)}
            return datasets.Dataset.from_dict(rows, features=datasets.Features(features))

        names = ("validation_matched", "validation_mismatched") if name == "mnli" else ("validation",)
        return datasets.DatasetDict({name: split(name) for name in ("train", *names, "test")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = glue_task(name)
    assert task.name == name
    assert tasks.glue_text_columns(name) == text_columns
    assert (task.pair, len(task.label_names)) == (len(text_columns) == 2, num_classes)
    assert (task.metrics[0], task.report_split) == (metric, "validation")
    extra = ["validation_mismatched"] if name == "mnli" else []
    assert list(task.splits) == ["train", "validation", *extra]
    matched = "validation_matched" if name == "mnli" else "validation"
    theirs = {"train": "train", "validation": matched, "validation_mismatched": "validation_mismatched"}
    for split, rows in task.splits.items():
        assert rows[0]["text"] == f"{text_columns[0]} of {theirs[split]}"
        assert rows[0].get("text_pair") == (f"{text_columns[1]} of {theirs[split]}" if task.pair else None)
