"""Tasks from files and hub data sets, and a clear sentence for every label or column that does not fit."""

import math
import os
import subprocess
import sys
from collections import Counter

import datasets
import pytest
from pydantic import ValidationError

from agwm_jax.data.columns import read_labelled
from agwm_jax.data.files import write_table
from agwm_jax.data.sources.base import TASK_SOURCES
from agwm_jax.data.sources.glue import GlueTask
from agwm_jax.data.sources.hub import HubTask
from agwm_jax.data.sources.local import LocalTask
from agwm_jax.data.sources.one_file import FileTask
from agwm_jax.errors import AgwmError


def local_source(files, **options):
    return LocalTask(files={split: str(file) for split, file in files.items()}, **options)


def local_task(files, **options):
    return local_source(files, **options).load()


def hub_task(path, **options):
    return HubTask(path=str(path), **options).load()


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
    task = local_task(files)
    assert task.label_names == ("0", "1")
    assert (task.kind, task.pair, task.metrics, task.report_split) == (
        "classification",
        False,
        ("accuracy", "macro_f1"),
        "validation",
    )
    assert task.splits["train"].to_dict() == {"text": ["train 0", "train 1", "train 2"], "label": [0, 1, 1]}
    assert list(task.splits["test"]["label"]) == [1, 1]


@pytest.mark.parametrize("extension", ["jsonl", "csv", "tsv", "parquet"])
def test_local_regression(tmp_path, extension):
    files = write(tmp_path, extension, train=[0.5, 5.0], validation=[2.25])
    task = local_task(files, kind="regression")
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
        ([True, False, True], None, ("false", "true"), [1, 0, 1]),
    ],
)
def test_label_mapping(tmp_path, labels, names, expected_names, expected):
    task = local_task(write(tmp_path, train=labels, validation=labels), label_names=names)
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
    assert list(local_task(files).splits["train"]["label"]) == [0, 1]
    files["train"].write_text(files["train"].read_text().replace("train 0", "TRAIN 0"))
    os.utime(
        files["train"], ns=(before.st_atime_ns, before.st_mtime_ns)
    )  # same size, same time: a cache would be stale
    assert local_task(files).splits["train"]["text"][0] == "TRAIN 0"


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        (
            {"train": [0, 1], "validation": [0, 2]},
            {},
            r"validation.jsonl, line 2: the label 2 is none of the 2 classes \('0', '1'",
        ),
        ({"train": ["a", "b"], "validation": ["c"]}, {}, "line 1: the label 'c' is none of"),
        ({"train": ["a", "b"], "validation": ["a"]}, {"label_names": ("a", "c")}, "train.jsonl, line 2: the label 'b'"),
        ({"train": [0, 2], "validation": [0]}, {"label_names": ("a", "b")}, "train.jsonl, line 2: the label 2"),
        ({"train": [0, -1], "validation": [0]}, {"label_names": ("a", "b")}, "train.jsonl, line 2: the label -1"),
        (
            {"train": ["0", "01"], "validation": ["0"]},
            {"label_names": ("a", "b")},
            "train.jsonl, line 2: the label '01'",
        ),
        ({"train": [1, 2], "validation": [3]}, {"label_names": ("1", "2")}, "the label 3 is none of"),
        ({"train": [1, 1], "validation": [1]}, {}, "all 2 training rows are of the class '1'"),
        ({"train": [0, None], "validation": [0]}, {}, "train.jsonl, line 2: no label in column 'label'"),
        ({"train": [0, [1]], "validation": [0]}, {}, r"line 2: the label is \[1\]"),
        ({"train": [0, 1], "validation": [0]}, {"label_column": "lable"}, "no column 'lable'.*did you mean 'label'"),
        ({"train": [0, 1], "validation": [0]}, {"group_column": "genre"}, "no column 'genre': its columns are 'text'"),
        ({"train": [0.5, math.nan], "validation": [1]}, {"kind": "regression"}, "line 2: no label"),
        (
            {"train": [0.5, math.inf], "validation": [1]},
            {"kind": "regression"},
            "line 2: the label inf is no finite",
        ),
        (
            {"train": [0.5, "high"], "validation": [1]},
            {"kind": "regression"},
            "line 2: the label 'high' is no finite",
        ),
        ({"train": [0.5, "nan"], "validation": [1]}, {"kind": "regression"}, "line 2: the label 'nan' is no finite"),
        ({"train": [0.5, "1_1"], "validation": [1]}, {"kind": "regression"}, "line 2: the label '1_1' is no finite"),
        ({"train": [0.5, True], "validation": [1]}, {"kind": "regression"}, "line 2: the label True is no finite"),
        ({"train": [2.0, 2.0], "validation": [1]}, {"kind": "regression"}, "all 2 training labels are 2.0"),
    ],
)
def test_bad_tasks(tmp_path, splits, options, message):
    with pytest.raises(AgwmError, match=message):
        local_task(write(tmp_path, **splits), **options)


def test_empty_csv_fields_are_missing(tmp_path):
    files = write(tmp_path, "csv", train=[0, 1], validation=[0, 1])
    files["train"].write_text("text,label\na,0\n,1\n")
    with pytest.raises(AgwmError, match=r"train\.csv, line 3: no text in column 'text'"):
        local_task(files)
    files["train"].write_text("text,label\na,\nb,1\n")
    with pytest.raises(AgwmError, match=r"train\.csv, line 2: no label"):
        local_task(files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_names": ("a", "a")}, "label_names: holds 'a' more than once"),
        ({"label_names": ("n\u00e9", "ne\u0301")}, "label_names: holds 'n\u00e9' more than once"),
        ({"label_names": ("a", "b"), "kind": "regression"}, "label_names: a regression has no classes"),
        ({"text_columns": ("text", "text")}, "text_columns: a pair needs two different"),
        ({"report_split": "test"}, "report_split: test needs files.test"),
        ({"metrics": ("acuracy",)}, "metrics: there is no metric 'acuracy'; did you mean accuracy"),
        ({"metrics": ("pearson",)}, "metrics: 'pearson' is no metric for classification: take accuracy"),
        ({"separator": ";"}, "separator: none of the files is a .csv"),
        ({"separator": ":"}, "separator"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(ValidationError, match=message):
        local_source({"train": "a.jsonl", "validation": "b.jsonl"}, **options)


def test_two_splits_in_one_file(tmp_path):
    files = write(tmp_path, train=[0, 1], validation=[0])
    (tmp_path / "link.jsonl").symlink_to(files["train"])
    for other in (files["train"], tmp_path / "link.jsonl", f"{tmp_path}/./train.jsonl"):
        with pytest.raises(ValidationError, match=r"files.test: .* is the train file too"):
            local_source({**files, "test": other})


def test_one_file_is_cut_into_folds_and_a_test(tmp_path):
    (file,) = write(tmp_path, train=[0, 1] * 30).values()
    task = FileTask(file=str(file), test_share=0.2, folds=4)
    whole = task.load()
    test = set(whole.splits["test"]["text"])
    assert (len(whole.splits["train"]), len(test)) == (48, 12)
    assert not test & set(whole.splits["train"]["text"])
    assert set(task.load().splits["test"]["text"]) == test  # the same in every run
    rows = task.rows(whole, 2)
    assert {name: len(each) for name, each in rows.items()} == {"train": 36, "validation": 12}
    (other,) = write(tmp_path, test=[0, 1]).values()
    assert len(FileTask(file=str(file), test=str(other)).load().splits["test"]) == 2
    assert FileTask(file=str(file), test=str(other)).data_files() == (str(file), str(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": "b.csv", "test_share": 0.2}, "test_share: there is a test file; remove one"),
        ({"test": "./a.jsonl"}, "test: is the training file too"),
        ({"report_split": "test"}, "report_split: test needs test or test_share"),
        ({"train_size": 20}, "train_size: folds say what is trained on"),
        ({"separator": ";"}, "separator: none of the files is a .csv"),
        ({"folds": 1}, "folds"),
        ({"test_share": 0.6}, "test_share"),
    ],
)
def test_settings_of_one_file_that_do_not_fit(options, message):
    with pytest.raises(ValidationError, match=message):
        FileTask(file="a.jsonl", **options)


def test_digests_tell_a_corrected_file(tmp_path):
    source = local_source(write(tmp_path, train=[0, 1], validation=[0]))
    before = source.digests()
    assert list(before) == [str(tmp_path / "train.jsonl"), str(tmp_path / "validation.jsonl")]
    assert before == source.digests()
    assert TASK_SOURCES["agreement"].value().digests() == {}
    (tmp_path / "validation.jsonl").write_text('{"text": "validation 0", "label": 1}\n')
    after = source.digests()
    assert [path for path in after if after[path] != before[path]] == [str(tmp_path / "validation.jsonl")]
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(AgwmError, match=r"train.jsonl cannot be read: No such file"):
        source.digests()


def test_settings_are_listed_without_the_libraries_that_read_data():
    program = (
        "import sys; from agwm_jax.data.sources.base import TASK_SOURCES; from agwm_jax.metrics import METRICS; "
        "print(*TASK_SOURCES, *METRICS, *({'datasets', 'pyarrow', 'scipy', 'sklearn', 'flax'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    names = "agreement file glue hub local accuracy f1 macro_f1 matthews pearson spearman"
    assert answer.stdout.split() == names.split()


def test_read_labelled_uses_the_classes_of_the_task(tmp_path):
    task = local_task(write(tmp_path, train=["b", "a", "c"], validation=["a"]))
    write_table(tmp_path / "new.csv", {"text": ["x", "y"], "label": ["c", "c"]})
    split = read_labelled(tmp_path / "new.csv", task, text_columns=("text",), label_column="label")
    assert split.to_dict() == {"text": ["x", "y"], "label": [2, 2]}
    write_table(tmp_path / "new.csv", {"text": ["x"], "label": ["d"]})
    with pytest.raises(AgwmError, match="the label 'd' is none of"):
        read_labelled(tmp_path / "new.csv", task, text_columns=("text",), label_column="label")


# Real data


@pytest.mark.parametrize(
    ("name", "text_columns", "kind", "sizes"),
    [
        ("cola", ("sentence",), "classification", {"train": 8551, "validation": 1043}),
        ("rte", ("sentence1", "sentence2"), "classification", {"train": 2490, "validation": 277}),
        ("stsb", ("sentence1", "sentence2"), "regression", {"train": 5749, "validation": 1500, "test": 1379}),
        ("citation_intent", ("sentence",), "classification", {"train": 1688, "validation": 114, "test": 139}),
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
        clean = local_task(files, text_columns=text_columns, kind=kind, drop_leaked=True)
        kept = Counter(clean.splits["train"]["label"])
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
    task = hub_task(hub_folder, text_columns=("review",), label_column="stars")
    assert task.label_names == ("bad", "good")
    assert list(task.splits) == ["train", "validation"]
    assert task.splits["train"].to_dict() == {"text": ["train 0", "train 1", "train 2"], "label": [0, 1, 1]}
    assert task.report_split == "validation"
    assert not list((tmp_path / "cache").iterdir())
    source = HubTask(
        path=str(hub_folder), text_columns=("review",), label_column="stars", splits={"test": "validation"}
    )
    assert list(source.load().splits) == ["train", "validation", "test"]
    assert [os.path.basename(path)[:5] for path in source.digests()] == ["test-", "train", "valid"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_columns": ("reviews",)}, "split train has no column 'reviews'.*did you mean 'review'"),
        ({"splits": {"test": "dev"}}, "has no split 'dev': its splits are train, validation, test"),
        ({"splits": {"test": "test"}}, "split test, row 1: the label -1 is none of the 2 classes"),
        ({"name": "large"}, "cannot be loaded: .*large"),
    ],
)
def test_bad_hub_tasks(hub_folder, options, message):
    with pytest.raises(AgwmError, match=message):
        hub_task(hub_folder, **{"text_columns": ("review",), "label_column": "stars", **options})


def test_no_network():
    assert datasets.config.HF_HUB_OFFLINE  # tests/conftest.py
    with pytest.raises(
        AgwmError, match=r"nyu-mll/glue \(cola\) is not in the local cache and the hub cannot be reached"
    ):
        GlueTask(name="cola").load()


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
    source = GlueTask(name=name)
    task = source.load()
    assert task.name == name
    assert source.columns() == (text_columns, "label")
    assert (task.pair, len(task.label_names)) == (len(text_columns) == 2, num_classes)
    assert (task.metrics[0], task.report_split) == (metric, "validation")
    extra = ["validation_mismatched"] if name == "mnli" else []
    assert list(task.splits) == ["train", "validation", *extra]
    matched = "validation_matched" if name == "mnli" else "validation"
    theirs = {"train": "train", "validation": matched, "validation_mismatched": "validation_mismatched"}
    for split, rows in task.splits.items():
        assert rows[0]["text"] == f"{text_columns[0]} of {theirs[split]}"
        assert rows[0].get("text_pair") == (f"{text_columns[1]} of {theirs[split]}" if task.pair else None)
