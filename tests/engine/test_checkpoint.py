"""Checkpoints are trusted only if every bit is what was written, and written while training goes on."""

import logging
import resource
import threading

import chex
import jax
import jax.numpy as jnp
import pytest

from agwm_jax.core.types import LowRank
from agwm_jax.engine.checkpoint import Checkpoints, Position
from agwm_jax.errors import AgwmError


def state(value):
    return {
        "state": {"a.kernel": jnp.full((64, 64), value), "gate": LowRank(jnp.ones((4, 1)), jnp.zeros((1, 4)))},
        "held": {"0/task/a.kernel": jnp.arange(3)},
        "none": {},
    }


def template(position):
    del position
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state(0.0))


def at(step, seeds=(0,), together=False):
    return Position(0, step, {"finetune": 1.5 * step}, list(seeds), together, {})


def opened(folder, fingerprint="data"):
    return Checkpoints(folder, keep=2, fingerprint=fingerprint)


def restore(folder, **options):
    checkpoints = opened(folder, **options)
    try:
        return checkpoints.restore(template, at(0))
    finally:
        checkpoints.close()


@pytest.fixture(params=["plain", "set [1] of {2} *?"])
def folder(request, tmp_path):
    """Checkpoints of steps 1, 2 and 3, of which the last two are kept; also where the name has signs of a pattern."""
    folder = tmp_path / request.param / "checkpoints"
    checkpoints = opened(folder)
    for step in (1, 2, 3):
        checkpoints.save(step, at(step), state(float(step)))
    checkpoints.close()
    return folder


def biggest_file(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_newest_is_restored_with_structure_and_position(folder):
    position, restored = restore(folder)
    assert position == at(3)
    chex.assert_trees_all_equal(restored, state(3.0))
    assert jax.tree.structure(restored) == jax.tree.structure(state(3.0))
    assert sorted(path.name for path in folder.iterdir()) == ["2", "2.checkpoint.json", "3", "3.checkpoint.json"]


@pytest.mark.parametrize("damage", [flip_a_bit, lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.unlink()])
def test_a_damaged_one_gives_way_to_the_one_before_and_says_so(folder, damage, caplog):
    damage(biggest_file(folder / "3"))
    with caplog.at_level(logging.WARNING, logger="agwm_jax"):
        position, restored = restore(folder)
    assert position.step == 2
    chex.assert_trees_all_equal(restored, state(2.0))
    assert "3 is damaged" in caplog.text
    assert "falling back to the one before" in caplog.text
    assert not (folder / "3").exists()


def test_nothing_whole_means_from_the_start(folder):
    for step in (2, 3):
        flip_a_bit(biggest_file(folder / str(step)))
    assert restore(folder) is None


def test_one_without_its_record_was_cut_short_and_is_written_anew(folder):
    (folder / "3.checkpoint.json").unlink()
    assert restore(folder)[0].step == 2
    checkpoints = opened(folder)
    checkpoints.save(3, at(3), state(30.0))
    checkpoints.close()
    chex.assert_trees_all_equal(restore(folder)[1], state(30.0))


@pytest.fixture
def one(tmp_path):
    """A checkpoint of step 3."""
    checkpoints = opened(tmp_path)
    checkpoints.save(3, at(3), state(3.0))
    checkpoints.close()
    return tmp_path


@pytest.mark.parametrize("ends", ["the next one", "the end"])
def test_what_a_killed_write_left_goes_with(one, ends):
    """Each may be as large as the weights; what is not of ours stays."""
    for name in ("4.orbax-checkpoint-tmp", "5"):
        (one / name).mkdir()
        (one / name / "part").write_text("x")
    (one / "5.checkpoint.part").write_text("{")
    (one / "mine.txt").write_text("mine")
    checkpoints = opened(one)
    if ends == "the next one":
        checkpoints.save(6, at(6), state(6.0))
    else:
        checkpoints.delete()
    checkpoints.close()
    kept = {"3", "3.checkpoint.json", "6", "6.checkpoint.json"} if ends == "the next one" else set()
    assert {path.name for path in one.iterdir()} == {"mine.txt"} | kept


def test_other_data_is_refused_and_nothing_is_deleted(one):
    with pytest.raises(AgwmError, match="other training data or another pretrained model"):
        restore(one, fingerprint="other")
    assert (one / "3").exists()


@pytest.mark.parametrize(
    ("expected", "words"),
    [(at(0, seeds=(0, 1)), "would train seeds [0, 1] side by side"), (at(0, together=True), "all splits at once")],
)
def test_other_seeds_or_phases_are_refused_and_nothing_is_deleted(one, expected, words):
    checkpoints = opened(one)
    with pytest.raises(AgwmError, match=r"are of seed 0, this run .*; continue with run\.vectorize auto") as raised:
        checkpoints.restore(template, expected)
    checkpoints.close()
    assert words in str(raised.value)
    assert (one / "3").exists()


def test_a_write_that_fails_keeps_what_is_there(one):
    checkpoints = opened(one)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"x": jax.random.normal(jax.random.key(0), (512, 512))}

    def write():
        checkpoints.save(4, at(4), large)
        checkpoints.wait()

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # what a full disk does, without one
    try:
        with pytest.raises(AgwmError, match=r"could not write a checkpoint.*earlier checkpoints are kept"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.close()
    assert restore(one)[0].step == 3


def test_training_goes_on_while_one_is_written_and_the_next_waits_for_it(tmp_path, monkeypatch):
    """The state that was handed over is donated at once; the digest is held back until the test lets it go."""
    checkpoints, gate, digesting = opened(tmp_path), threading.Event(), threading.Event()
    digest = Checkpoints._digest

    def held_back(self, step):
        digesting.set()
        assert gate.wait(120)
        return digest(self, step)

    monkeypatch.setattr(Checkpoints, "_digest", held_back)
    following = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    current = state(0.0)
    checkpoints.save(1, at(1), current)
    for _ in range(3):  # the main thread is free
        current = following(current)
    assert digesting.wait(120)
    assert not (tmp_path / "1.checkpoint.json").exists(), "not whole before its digest is there"
    second = threading.Thread(target=checkpoints.save, args=(4, at(4), current))
    second.start()
    second.join(0.3)
    assert second.is_alive(), "the next waits"
    assert not (tmp_path / "4").exists()
    gate.set()
    second.join(120)
    checkpoints.close()
    assert restore(tmp_path)[0] == at(4)
    flip_a_bit(biggest_file(tmp_path / "4"))
    chex.assert_trees_all_equal(restore(tmp_path)[1], state(0.0))


def test_the_one_before_stays_until_the_next_is_whole(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1, fingerprint="data")
    checkpoints.save(1, at(1), state(1.0))
    checkpoints.wait()

    def dies(self, step):
        raise OSError("no space left")

    monkeypatch.setattr(Checkpoints, "_digest", dies)
    checkpoints.save(2, at(2), state(2.0))
    with pytest.raises(AgwmError, match=r"could not write a checkpoint .*\(no space left\); earlier checkpoints are"):
        checkpoints.wait()
    monkeypatch.undo()
    checkpoints.close()
    assert restore(tmp_path)[0] == at(1)
