"""Checkpoints are trusted only if every bit is what was written."""

import logging
import resource

import jax
import jax.numpy as jnp
import pytest

from agwm_jax.core.types import LowRank
from agwm_jax.engine.checkpoint import Checkpoints, Position, abstract
from agwm_jax.errors import AgwmError


def state(value):
    return {
        "task": {"a.kernel": jnp.full((64, 64), value)},
        "alpha": {"a.kernel": LowRank(jnp.ones((4, 1)), jnp.zeros((1, 4)))},
        "none": {},
    }


def restore(checkpoints):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = state(0.0)
    return checkpoints.restore(lambda position: abstract(like, jax.tree.map(lambda _: sharding, like)), at(0))


def at(step, seeds=(0,), together=False):
    return Position(0, step, {"finetune": 1.5 * step}, list(seeds), together, {})


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 1, 2 and 3, of which the last two are kept."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, fingerprint="data")
    for step in (1, 2, 3):
        checkpoints.save(step, at(step), state(float(step)))
    checkpoints.close()
    return tmp_path / "checkpoints"


def biggest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_newest_is_restored_with_structure_and_position(folder):
    checkpoints = Checkpoints(folder, keep=2, fingerprint="data")
    position, restored = restore(checkpoints)
    assert position == at(3)
    assert jax.tree.structure(restored) == jax.tree.structure(state(3.0))
    assert bool((restored["task"]["a.kernel"] == 3.0).all())
    assert sorted(path.name for path in folder.glob("[0-9]*")) == ["2", "2.sha256.json", "3", "3.sha256.json"]


@pytest.mark.parametrize("damage", [flip_a_bit, lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.unlink()])
def test_a_damaged_one_gives_way_to_the_one_before_and_says_so(folder, damage, caplog):
    damage(biggest_file(folder / "3"))
    with caplog.at_level(logging.WARNING, logger="agwm_jax"):
        position, restored = restore(Checkpoints(folder, keep=2, fingerprint="data"))
    assert position.step == 2
    assert bool((restored["task"]["a.kernel"] == 2.0).all())
    assert "3 is damaged" in caplog.text
    assert "falling back to the one before" in caplog.text


def test_nothing_whole_means_from_the_start(folder):
    for step in (2, 3):
        flip_a_bit(biggest_file(folder / str(step)))
    assert restore(Checkpoints(folder, keep=2, fingerprint="data")) is None


def test_one_without_digests_was_cut_short(folder):
    (folder / "3.sha256.json").unlink()
    assert restore(Checkpoints(folder, keep=2, fingerprint="data"))[0].step == 2


def test_other_data_is_refused_and_nothing_is_deleted(folder):
    with pytest.raises(AgwmError, match="other training data or another pretrained model"):
        restore(Checkpoints(folder, keep=2, fingerprint="other"))
    assert (folder / "3").exists()


@pytest.mark.parametrize(
    ("expected", "words"),
    [(at(0, seeds=(0, 1)), "would train seeds [0, 1] side by side"), (at(0, together=True), "all splits at once")],
)
def test_other_seeds_or_splits_are_refused_and_nothing_is_deleted(folder, expected, words):
    with pytest.raises(AgwmError, match=r"are of seed 0, this run .*; continue with run\.vectorize auto") as raised:
        Checkpoints(folder, keep=2, fingerprint="data").restore(lambda position: None, expected)
    assert words in str(raised.value)
    assert (folder / "3").exists()


def test_a_write_that_fails_keeps_what_is_there(folder):
    checkpoints = Checkpoints(folder, keep=2, fingerprint="data")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"x": jax.random.normal(jax.random.key(0), (512, 512))}
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # what a full disk does, without one
    try:
        with pytest.raises(AgwmError, match=r"could not write a checkpoint.*earlier checkpoints are kept"):
            checkpoints.save(4, at(4), large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert restore(Checkpoints(folder, keep=2, fingerprint="data"))[0].step == 3
