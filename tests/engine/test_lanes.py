"""Seeds and splits side by side learn what they would alone, on any mesh, and one that diverges takes nobody along."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from agwm_jax import hypergrad, partition
from agwm_jax.data.plan import epoch_plan, search_plan, split_indices
from agwm_jax.engine.checkpoint import Checkpoints
from agwm_jax.engine.lanes import Lanes, Member, rounds
from agwm_jax.engine.loop import Interrupted, Layout, fit
from agwm_jax.engine.sharding import make_placement
from agwm_jax.errors import AgwmError, Diverged
from agwm_jax.methods import Weights, agwm
from agwm_jax.runs.recorder import Recorders

SEEDS, SPLITS, EXAMPLES, WIDTH = (3, 5), 2, 40, 8
KERNEL = "encoder.layers.query.kernel"  # a path that the rules of the mesh know


def loss(params, batch):
    def layer(x, kernel):
        return jnp.tanh(x @ kernel), None

    x = jax.lax.scan(layer, batch["x"], params[KERNEL])[0]
    kept = jax.random.bernoulli(batch["key"], 0.9, x.shape)
    error = (jnp.where(kept, x, 0) @ params["classifier.kernel"])[:, 0] - batch["labels"]
    return jnp.sum(batch["weight"] * error**2) / jnp.sum(batch["weight"])


def build_member(seed, *, same_data=False, learning_rate=0.02):
    """A two-layer model with a frozen part, its own draw of the data and its own start."""
    rng = np.random.default_rng(0 if same_data else seed)
    x = rng.normal(size=(EXAMPLES, WIDTH)).astype(np.float32)
    data = {"x": x, "labels": np.sin(x.sum(1))}
    shared = 0.5 * jax.random.normal(jax.random.key(9), (2, WIDTH, WIDTH))
    head = jax.random.normal(jax.random.key(seed), (WIDTH, 1))
    parts = partition({KERNEL: shared, "classifier.kernel": head}, mixed=".*query.*")
    plans = []
    for index in range(SPLITS):
        rng = np.random.default_rng([seed, index])
        train, validation = split_indices(EXAMPLES, validation_fraction=0.25, rng=rng)
        inner, outer = search_plan(train, validation, batch_size=8, inner_steps=1, epochs=2, rng=rng)
        plans.append({"inner": inner, "outer": outer})
    finetune = epoch_plan(np.arange(EXAMPLES), batch_size=8, epochs=2, rng=np.random.default_rng(seed))
    method = agwm(
        loss,
        plans,
        {"train": finetune},
        hypergrad=hypergrad.unrolled(),
        inner_tx=optax.adam(learning_rate, eps_root=1e-8),
        outer_tx=optax.adam(0.05),
        finetune_tx=optax.adam(learning_rate),
        mixed=(KERNEL,),
        anchor=0.1,
    )
    alpha = method.init_alpha(jax.random.key(seed), parts)
    return Member(seed, method, parts.frozen, Weights(parts.task, alpha), data, jax.random.key(seed + 100))


@pytest.fixture(scope="module")
def members():
    """Two seeds that share the pretrained kernel, as whole runs do."""
    first, second = (build_member(seed) for seed in SEEDS)
    frozen = {KERNEL: first.frozen[KERNEL]}
    task = {**second.initial.task, KERNEL: first.initial.task[KERNEL]}
    return first, second._replace(frozen=frozen, initial=second.initial._replace(task=task))


def run(members, folder, *, together=False, mesh=(1, 1, 1), fully_sharded=False, stop_at=None):
    """What `fit` gives, and the losses of each member by phase and step."""
    seed, data, model = mesh
    placement = make_placement(seed=seed, data=data, model=model, fully_sharded=fully_sharded)
    folders = [folder / f"seed-{member.seed}" for member in members]
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    names = [f"seed {member.seed}" for member in members]
    recorders = Recorders(folders, names, tensorboard=False, progress=False)
    shown = recorders.show

    def show(completed):
        shown(completed)
        if stop_at is not None and len(recorders.records(0)) >= stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    recorders.show = show
    checkpoints = Checkpoints(folder / "checkpoints", keep=2, fingerprint="toy")
    try:
        outcome = fit(
            members,
            layout=Layout(placement, together),
            checkpoints=checkpoints,
            recorders=recorders,
            chunk_steps=3,
            checkpoint_steps=4,
        )
    finally:
        checkpoints.close()
    return outcome, [curves(path) for path in folders]


def curves(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = [(line["phase"], line["step"]) for line in lines]
    assert len(set(keys)) == len(keys), "a step is recorded once"
    return {key: (line["loss"], line.get("hypergradient_norm", 0.0)) for key, line in zip(keys, lines, strict=True)}


def assert_same(found, expected):
    (outcome, losses), (wanted, wanted_losses) = found, expected
    for ours, theirs in zip(losses, wanted_losses, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-6), key
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-3, atol=2e-5),
        outcome.weights,
        wanted.weights,
    )


@pytest.fixture(scope="module")
def alone(members, tmp_path_factory):
    """Each seed by itself, its searches one after the other, on one device: what all else is held to."""
    folder = tmp_path_factory.mktemp("alone")
    runs = [run([member], folder / str(member.seed)) for member in members]
    return runs[0][0]._replace(weights=[outcome.weights[0] for outcome, _ in runs]), [losses[0] for _, losses in runs]


def test_seeds_differ(alone):
    (first, second), weights = alone[1], alone[0].weights
    assert first.keys() == second.keys()
    assert all(first[key] != second[key] for key in first)
    assert np.abs(np.asarray(weights[0].task[KERNEL]) - np.asarray(weights[1].task[KERNEL])).max() > 1e-3


@pytest.mark.parametrize(
    ("together", "mesh", "fully_sharded"),
    [
        (False, (1, 1, 1), False),
        (True, (1, 1, 1), False),
        (True, (2, 2, 2), False),
        (False, (1, 8, 1), True),
    ],
    ids=["seeds", "seeds and splits", "on a mesh of seeds, data and model", "fully sharded"],
)
def test_side_by_side_equals_one_by_one(members, alone, tmp_path, together, mesh, fully_sharded):
    found = run(members, tmp_path, together=together, mesh=mesh, fully_sharded=fully_sharded)
    assert_same(found, alone)
    assert ("search-0..1" in found[0].seconds) == together


def test_splits_of_one_seed_side_by_side(members, alone, tmp_path):
    outcome, losses = run(members[:1], tmp_path, together=True)
    assert_same((outcome, losses), (alone[0]._replace(weights=alone[0].weights[:1]), alone[1][:1]))


def test_one_program_serves_all_searches_and_one_all_seeds(members, tmp_path, monkeypatch):
    compiled = []
    compile_ = Lanes.compile
    monkeypatch.setattr(Lanes, "compile", lambda self, *args: compiled.append(self.round.name) or compile_(self, *args))
    run(members, tmp_path)
    assert compiled == ["search-0", "finetune"]


@pytest.mark.parametrize("stop_at", [5, 14, 19], ids=["in search-0", "in search-1", "in finetune"])
def test_a_checkpoint_goes_from_mesh_to_mesh(members, alone, tmp_path, stop_at):
    with pytest.raises(Interrupted, match="the state is saved"):
        run(members, tmp_path, mesh=(2, 2, 2), stop_at=stop_at)
    with pytest.raises(Interrupted, match="the state is saved"):
        run(members, tmp_path, stop_at=stop_at + 3)
    assert_same(run(members, tmp_path, mesh=(1, 4, 2), fully_sharded=True), alone)


def test_a_checkpoint_of_other_lanes_is_refused(members, tmp_path):
    with pytest.raises(Interrupted):
        run(members, tmp_path, together=True, stop_at=5)
    with pytest.raises(
        AgwmError, match=r"of seeds \[3, 5\] side by side, all splits at once, this run would train seeds"
    ):
        run(members, tmp_path)
    with pytest.raises(AgwmError, match="this run would train seed 3, all splits at once; continue with"):
        run(members[:1], tmp_path, together=True)


def test_a_seed_that_diverges_is_given_up_and_the_other_goes_on(members, alone, tmp_path, capsys):
    data = {**members[1].data, "labels": np.full(EXAMPLES, np.inf, np.float32)}
    outcome, losses = run([members[0], members[1]._replace(data=data)], tmp_path)
    assert_same(
        (outcome._replace(weights=outcome.weights[:1]), losses[:1]),
        (alone[0]._replace(weights=alone[0].weights[:1]), alone[1][:1]),
    )
    assert outcome.weights[1] is None
    assert "search-0: loss became inf at step 0; lower the learning rate" in outcome.diverged[1]
    assert len(losses[1]) == 3, "its curve ends with the chunk that it diverged in"
    assert "seed 5: given up, the others go on" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(Diverged, match=r"all that went side by side diverged, .*: loss became inf .*no checkpoint\)"):
        run([member._replace(data=data) for member in members], tmp_path / "all")


def test_a_seed_that_was_given_up_stays_so_when_the_run_goes_on_after_its_last_step(members, tmp_path):
    broken = members[1]._replace(data={**members[1].data, "labels": np.full(EXAMPLES, np.inf, np.float32)})
    with pytest.raises(Interrupted, match="after step 10 of 10"):
        run([members[0], broken], tmp_path, stop_at=sum(phase.num_steps for phase in members[0].method.phases))
    outcome, _ = run([members[0], broken], tmp_path)
    assert outcome.weights[0] is not None
    assert outcome.weights[1] is None
    assert "loss became inf" in outcome.diverged[1]


def test_the_training_set_lies_on_the_devices_once_where_it_is_one(tmp_path):
    from agwm_jax.engine.lanes import table

    first, second = (build_member(seed, same_data=True) for seed in SEEDS)
    assert table([first, second._replace(data=first.data)]).first == (0, 0)
    assert len(table([first, second._replace(data=first.data)]).columns["x"]) == EXAMPLES
    both = table([build_member(seed) for seed in SEEDS])
    assert both.first == (0, EXAMPLES)
    np.testing.assert_array_equal(both.columns["x"][EXAMPLES:], build_member(SEEDS[1]).data["x"])


def test_rounds_follow_the_stages(members):
    apart, together = (rounds(members[0].method, together=flag) for flag in (False, True))
    assert [(r.name, r.numbers) for r in apart] == [("search-0", (0,)), ("search-1", (1,)), ("finetune", (2,))]
    assert [(r.name, r.numbers) for r in together] == [("search-0..1", (0, 1)), ("finetune", (2,))]
