"""What a stranger's file must not do: run code, be unpickled, take memory, or write where it should not."""

import json
import os
import pickle
import shutil
import struct

import pytest

from agwm_jax import AgwmError, load_config, load_pretrained

MARK = "ran.txt"


@pytest.fixture
def hostile(tiny_checkpoint, tmp_path, monkeypatch):
    """A copy of the tiny checkpoint, and the working directory in which code of it would leave its mark."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


def test_code_beside_a_checkpoint_is_not_run(hostile, tmp_path):
    code = f"open({str(tmp_path / MARK)!r}, 'w').write('x')\nclass Evil:\n    pass\n"
    for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
        (hostile / name).write_text(code)
    maps = {"AutoConfig": "configuration_evil.Evil", "AutoModel": "modeling_evil.Evil"}
    for file, key in (
        ("config.json", maps),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_evil.Evil", None]}),
    ):
        said = json.loads((hostile / file).read_text())
        (hostile / file).write_text(json.dumps({**said, "auto_map": key}))
    model = load_pretrained(hostile, num_labels=2)
    assert len(model.tokenizer("a text")["input_ids"]) > 0
    assert not (tmp_path / MARK).exists()


class _Evil:
    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_not_opened_whatever_it_is_called(hostile, tmp_path, name):
    (hostile / "model.safetensors").unlink()
    (hostile / name).write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(AgwmError, match="safetensors"):
        load_pretrained(hostile, num_labels=2)
    assert not (tmp_path / MARK).exists()


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 2**62),
        struct.pack("<Q", 2**20) + b"{}",
        (lambda text: struct.pack("<Q", len(text)) + text)(
            json.dumps({"w": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 2**62]}}).encode()
        ),
        (lambda text: struct.pack("<Q", len(text)) + text)(b"[" * 5000),
    ],
    ids=["a header of 4 EiB", "a header that is cut", "a tensor of 4 YiB", "a nested header"],
)
def test_a_header_that_lies_is_a_sentence(hostile, header):
    (hostile / "model.safetensors").write_bytes(header)
    with pytest.raises(AgwmError, match=r"model\.safetensors"):
        load_pretrained(hostile, num_labels=2)


@pytest.mark.parametrize(
    "text",
    [
        f"run: !!python/object/apply:os.system ['touch {MARK}']\n",
        f"run: !!python/object/new:os.system ['touch {MARK}']\n",
        "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: &c [*b, *b, *b]\nrun: *c\n",
    ],
)
def test_yaml_makes_no_objects(hostile, tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(AgwmError):
        load_config(tmp_path / "c.yaml")
    assert not (tmp_path / MARK).exists()
