"""The room that a gate has: gates fitted to trained weights on one half of the evaluation texts, scored on the other.

    python experiments/leverage.py --config configs/stsb_300.yaml --output runs/leverage/stsb
    python experiments/leverage.py --config FILE --output FOLDER --rates 1e-4 --gates one layer --seeds 0

Plain fine-tuning is trained at each rate. Then its weights stay as they are, and the gate of
`W_eff = A * W + (1 - A) * W0` alone is fitted, from A = 1, by Adam on the loss of one half of the split that is
reported; the score is that of the other half, and the halves change places. No method may do so, since it fits on
evaluation texts: the gain over A = 1 is more than a gate of that form can be expected to give. Much of it may be the
gain of more texts, so there is a control: the weights themselves are trained on for as many steps on the same half.
Other settings as of `agwm train`. Writes leverage.csv, a row a gate, rate and seed, and leverage.md.
"""

import argparse
import csv
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from agwm_jax import AgwmError, load_config
from agwm_jax.data.plan import epoch_plan
from agwm_jax.engine.group import Layout
from agwm_jax.engine.loop import fit
from agwm_jax.engine.observer import InMemory
from agwm_jax.engine.sharding import make_placement
from agwm_jax.methods.mixup import ALPHA, Mixture, Mixup
from agwm_jax.methods.training import TASK
from agwm_jax.report.table import markdown_table
from agwm_jax.runs.build import Prepared, build, build_setup, recipe
from agwm_jax.runs.fitted import FittedModel

GATES: dict[str, Mixup | None] = {
    "one": Mixup(gate="one", noise=0),
    "layer": Mixup(gate="layer", noise=0),
    "kernel": Mixup(gate="kernel", noise=0),
    "column": Mixup(gate="column", noise=0),
    "rank 1": Mixup(rank=1),
    "rank 8": Mixup(rank=8),
    "weights": None,
}
"""What is fitted; the control is the trained weights themselves, on the same texts, with A = 1."""


def trained(config: Any, seeds: list[int]) -> list[tuple[Prepared, dict[str, np.ndarray]]]:
    """Every seed with the weights that plain fine-tuning gave it."""
    prepared = build(config, seeds)
    outcome = fit(
        [each.member for each in prepared],
        layout=Layout(make_placement(seed=1, data=1, model=1, fully_sharded=False)),
        weights=prepared[0].pretrained.model.weights,
        observer=InMemory(len(prepared)),
        chunk_steps=config.run.chunk_steps,
    )
    return [(each, learnt[TASK]) for each, learnt in zip(prepared, outcome.learnt, strict=True) if learnt is not None]


class Fitter:
    """Fits a gate to trained weights, or None these weights, by one program for all seeds and rates."""

    def __init__(self, config: Any, example: Prepared, gate: Mixup | None, *, steps: int, rate: float, batch_size: int):
        """`steps` of Adam at `rate`, decayed to 0 by a cosine, on batches of `batch_size`."""
        kind, how = example.draw.task.kind, recipe(config)
        self.setup = build_setup(how, example.pretrained, kind, seed=0, num_examples=example.train_size)
        self.mixture = gate and Mixture(gate, self.setup)
        self.steps, self.batch_size = steps, batch_size
        self.tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
        self.fit, self.merge = jax.jit(self._fit), jax.jit(self._merge)

    def rows(self, half: np.ndarray) -> np.ndarray:
        """Batches of a half, pass after pass."""
        size = min(self.batch_size, len(half))
        passes = math.ceil(self.steps * size / len(half))
        plan = epoch_plan(half, batch_size=size, epochs=passes, rng=np.random.default_rng(0), what="half of the split")
        return plan[: self.steps]

    def _fit(self, pretrained, task, data, rows):
        loss, mixture = self.setup.loss(reverse_only=True), self.mixture

        def step(carry, rows):
            found, state = carry
            batch = {**{name: x[rows] for name, x in data.items()}, "weight": (rows >= 0).astype(jnp.float32)}

            def of(found):
                if mixture is None:
                    return loss({**pretrained, **found}, batch)
                return loss(mixture.through(pretrained, task, mixture.gates(found)), batch)

            value, gradient = jax.value_and_grad(of)(found)
            updates, state = self.tx.update(gradient, state, found)
            found = optax.apply_updates(found, updates)
            return (found if mixture is None else mixture.project(found), state), value

        found = task if mixture is None else mixture.init_alpha(jax.random.key(0), pretrained)
        (found, _), _ = jax.lax.scan(step, (found, self.tx.init(found)), rows)
        return found, jnp.float32(1) if mixture is None else mixture.statistics(found)["alpha_mean"]

    def _merge(self, pretrained, task, found):
        if self.mixture is None:
            return {**pretrained, **found}
        return self.mixture.merge(pretrained, {TASK: task, ALPHA: found})


def score(config: Any, prepared: Prepared, params: Any, rows: np.ndarray) -> float:
    """Of some rows of the reported split, in points."""
    task, draw = prepared.draw.task, prepared.draw
    model = FittedModel(task, prepared.pretrained, params, draw.scale, config.data)
    part = {name: x[rows] for name, x in draw.encoded[task.report_split].items()}
    return 100 * model.scores(task.splits[task.report_split].select(rows), model.logits(part))[task.metrics[0]]


def measure(config: Any, prepared: Prepared, task: Any, fitters: dict[str, Fitter]) -> dict[str, dict[str, float]]:
    """By gate: mean over both ways round of the score, of the gain over A = 1, and of A."""
    encoded = prepared.draw.encoded[prepared.draw.task.report_split]
    order = np.random.default_rng(0).permutation(len(encoded["labels"]))
    halves = [np.sort(order[start::2]) for start in (0, 1)]
    pretrained = jax.device_put(prepared.pretrained.params)
    task, data = jax.device_put(task), jax.device_put(encoded)
    opened = {**pretrained, **task}
    plain = [score(config, prepared, opened, half) for half in halves]
    found = {"A = 1": {"score": statistics.fmean(plain), "gain": 0.0, "mean_gate": 1.0}}
    for name, fitter in fitters.items():
        scores, gates = [], []
        for half, other in zip(halves, halves[::-1], strict=True):
            fitted, mean_gate = fitter.fit(pretrained, task, data, fitter.rows(half))
            scores.append(score(config, prepared, fitter.merge(pretrained, task, fitted), other))
            gates.append(float(mean_gate))
        mean = statistics.fmean(scores)
        found[name] = {"score": mean, "gain": mean - statistics.fmean(plain), "mean_gate": statistics.fmean(gates)}
    return found


def main() -> int:
    """Train, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--config", type=Path, required=True, help="of the task")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3], help="of plain fine-tuning")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--gates", nargs="+", choices=GATES, default=list(GATES))
    parser.add_argument("--steps", type=int, default=100, help="of Adam, for a gate")
    parser.add_argument("--gate-rate", type=float, default=0.03, help="learning rate of a gate")
    parser.add_argument("--control-rate", type=float, default=1e-4, help="learning rate of the control `weights`")
    parser.add_argument("--gate-batch", type=int, default=64)
    arguments, settings = parser.parse_known_args()
    rows: list[dict[str, Any]] = []
    fitters: dict[str, Fitter] = {}
    try:
        for rate in arguments.rates:
            own = ["--method", "vanilla", "--finetune.epochs", "5", "--finetune.optimizer.learning_rate", repr(rate)]
            config = load_config(arguments.config, [*settings, *own])
            for prepared, task in trained(config, arguments.seeds):
                fitters = fitters or {
                    name: Fitter(
                        config,
                        prepared,
                        GATES[name],
                        steps=arguments.steps,
                        rate=arguments.gate_rate if GATES[name] else arguments.control_rate,
                        batch_size=arguments.gate_batch,
                    )
                    for name in arguments.gates
                }
                found = measure(config, prepared, task, fitters)
                where = {"task": prepared.draw.task.name, "rate": rate, "seed": prepared.seed}
                rows += [{**where, "gate": gate, **values} for gate, values in found.items()]
                _write(rows, arguments.output)
    except AgwmError as error:
        print(f"leverage: {error}", file=sys.stderr)
        return 2
    print((arguments.output / "leverage.md").read_text())
    return 0


def _write(rows: list[dict[str, Any]], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    with (output / "leverage.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(
            {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
            for row in rows
        )
    (output / "leverage.md").write_text(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Mean over seeds: the score at A = 1, and each gate's gain in points with its standard deviation and mean A."""
    lines = []
    for task, rate in dict.fromkeys((row["task"], float(row["rate"])) for row in rows):
        own = [row for row in rows if (row["task"], float(row["rate"])) == (task, rate)]
        cells = {"task": task, "rate": f"{rate:g}"}
        for gate in dict.fromkeys(row["gate"] for row in own):
            of = [row for row in own if row["gate"] == gate]
            gains = [float(row["gain"]) for row in of]
            spread = f" ± {statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
            gates = statistics.fmean(float(row["mean_gate"]) for row in of)
            scores = statistics.fmean(float(row["score"]) for row in of)
            cells[gate] = (
                f"{scores:.1f}" if gate == "A = 1" else f"{statistics.fmean(gains):+.1f}{spread} ({gates:.2f})"
            )
        lines.append(cells)
    return markdown_table(lines)


if __name__ == "__main__":
    sys.exit(main())
