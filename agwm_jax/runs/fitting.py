"""Fine-tuning in memory: one seed of a method on a task, without a folder; and what a trained seed amounts to."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from agwm_jax.core.types import Params
from agwm_jax.data.in_memory import as_task
from agwm_jax.engine.group import Layout
from agwm_jax.engine.liveness import dependence
from agwm_jax.engine.loop import fit as run_phases
from agwm_jax.engine.observer import InMemory
from agwm_jax.engine.sharding import Placement, make_placement, place
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import MethodSettings, Variables
from agwm_jax.models.family import output_paths
from agwm_jax.models.huggingface import Pretrained
from agwm_jax.runs.build import Prepared, prepare, recipe, truncations
from agwm_jax.runs.fitted import FittedModel, Predictions, Texts
from agwm_jax.runs.learning import guessing_loss, learning_warnings
from agwm_jax.settings.config import parse_config

Merge = Callable[[Prepared, Variables], Params]


class Result(NamedTuple):
    """What one seed learnt, and how good it is."""

    seed: int
    model: FittedModel
    learnt: Variables
    """The method's own variables, by collection."""
    scores: dict[str, dict[str, float]]
    """By split and metric; of all splits but the training split."""
    groups: dict[str, dict[str, dict[str, float]]]
    """By split that has groups, group and metric."""
    logits: dict[str, Float[np.ndarray, "n c"]]
    """Of the same splits, in the order of their rows; of a regression the score in the user's unit."""
    records: list[dict[str, Any]]
    """One a step, in order: its phase, and what the method tells of it."""
    seconds: dict[str, float]
    """By phase, and of what else takes time."""
    warnings: list[dict[str, str]]
    """Failure signatures and cut texts, each with a ``name`` and a ``message``."""

    @property
    def weights(self) -> Params:
        """All weights of the forward pass, by path."""
        return self.model.params

    def __repr__(self) -> str:
        scores = {split: {name: round(x, 4) for name, x in own.items()} for split, own in self.scores.items()}
        return f"<Result of seed {self.seed}: scores {scores}>"

    def _repr_markdown_(self) -> str:
        """What a notebook shows: scores by split, and warnings."""
        names = self.model.task.metrics
        lines = [f"| split | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
        for split, scores in self.scores.items():
            lines.append(f"| {split} | {' | '.join(f'{100 * scores[name]:.1f}' for name in names)} |")
        return "\n".join([*lines, "", *(f"- **{each['name']}**: {each['message']}" for each in self.warnings)]) + "\n"

    def predict(self, texts: Texts) -> Predictions:
        """See `FittedModel.predict`."""
        return self.model.predict(texts)

    def save(self, folder: str | os.PathLike[str]) -> str | None:
        """See `FittedModel.save`."""
        return self.model.save(folder)


def fit(
    model: Pretrained,
    method: MethodSettings | Mapping[str, Any] | str,
    task: Any,
    *,
    seed: int = 0,
    finetune: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    loss: Mapping[str, Any] | None = None,
    techniques: Sequence[str] | Mapping[str, Any] = (),
    frozen: str | None = None,
) -> Result:
    """Fine-tune a model in memory; what `agwm train` does, without a folder.

    >>> import agwm_jax                                                      # doctest: +SKIP
    >>> model = agwm_jax.load_pretrained("minilm", num_labels=2)             # doctest: +SKIP
    >>> result = agwm_jax.fit(model, "agwm", {"train": train, "test": test}) # doctest: +SKIP
    >>> result.scores["test"]["accuracy"], result.predict(["A text."])       # doctest: +SKIP
    >>> result.save("my-model")                                              # doctest: +SKIP

    Args:
        model: of `load_pretrained`; its fresh head is drawn anew from `seed`.
        method: name of a method, its settings, or a mapping of them as in a config.
        task: a `Task`; or ``(texts, labels)`` to train on; or a mapping from "train" and other splits, which are
            scored, to such pairs. Texts that are pairs make a task of pairs; labels that are floats a regression.
        seed: of everything that is drawn.
        finetune, data, loss: these sections of a config; what is left out is at its default.
        techniques: what changes the training, by name, with settings or without.
        frozen: pattern of the paths that are never trained.

    Raises:
        AgwmError: settings, data and model do not fit together.
        Diverged: a loss, a hypergradient or a weight is not finite.
    """
    chosen = method.model_dump(mode="json") if isinstance(method, MethodSettings) else method
    sections: dict[str, Any] = {
        "method": chosen,
        "finetune": finetune,
        "data": data,
        "loss": loss,
        "techniques": techniques,
    }
    config = parse_config({name: section for name, section in sections.items() if section is not None})
    whole = as_task(task)
    wanted = max(1, len(whole.label_names))
    outputs = model.params[output_paths(model.model.weights)[-1]].shape[-1]
    if outputs != wanted:
        raise AgwmError(
            f"the model's head has {outputs} outputs, the task needs {wanted}: say load_pretrained(..., "
            f"num_labels={wanted})."
        )
    how = recipe(config)._replace(frozen=frozen, rows=None)
    (prepared,) = prepare(whole, model, how, seeds=(seed,))
    placement = make_placement(seed=1, data=1, model=1, fully_sharded=False)
    observer = InMemory(1)
    outcome = run_phases(
        [prepared.member],
        layout=Layout(placement),
        weights=model.model.weights,
        observer=observer,
        chunk_steps=config.run.chunk_steps,
    )
    (learnt,) = outcome.learnt
    assert learnt is not None  # the only member: had it diverged, that would have been raised
    merge = merger(prepared, learnt, placement)
    return conclude(prepared, learnt, merge, how.data, placement, observer.records[0], outcome.seconds)


def merger(example: Prepared, learnt: Variables, placement: Placement) -> Merge:
    """`Method.merge` on the devices, compiled once for seeds that are alike; what it does not read stays away."""
    merge, weights = example.method.merge, example.pretrained.model.weights
    shapes = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in example.pretrained.params.items()}
    found = dependence(merge, shapes, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), learnt))
    read = {path for at, path in enumerate(sorted(shapes)) if found.reads[at] or at in found.passes}

    @jax.jit
    def merged(held: Params, learnt: Variables) -> Params:
        zeros = {path: jnp.zeros(x.shape, x.dtype) for path, x in shapes.items() if path not in held}
        return merge({**held, **zeros}, learnt)

    def of(prepared: Prepared, learnt: Variables) -> Params:
        held = {path: prepared.pretrained.params[path] for path in read}
        where = placement.of_tree(held, weights, {path: x.shape for path, x in shapes.items()})
        with jax.set_mesh(placement.mesh):
            return merged(place(held, where), learnt)

    return of


def conclude(
    prepared: Prepared,
    learnt: Variables,
    merge: Merge,
    data: Any,
    placement: Placement,
    records: Sequence[dict[str, Any]],
    seconds: Mapping[str, float],
) -> Result:
    """Score what a seed learnt on every split but the training split; all processes must call it."""
    draw = prepared.draw
    own, params = prepared.method.model, merge(prepared, learnt)
    model = FittedModel(draw.task, prepared.pretrained, params, draw.scale, data, placement, own)
    found: dict[str, Any] = {}
    scores, groups, learning = {}, {}, []
    for name, encoded in draw.encoded.items():
        if name != "train" and not os.path.isabs(name):  # a file that the method alone reads is not scored
            split, logits = draw.task.splits[name], model.logits(encoded)
            found[name], scores[name] = logits, model.scores(split, logits)
            groups[name] = model.group_scores(split, logits)
            if name == draw.task.report_split:
                guess = guessing_loss(
                    draw.encoded["train"]["labels"],
                    num_classes=len(draw.task.label_names),
                    weights=prepared.class_weights,
                    label_smoothing=prepared.loss.label_smoothing,
                )
                learning = learning_warnings(records, guess, logits, np.asarray(split["label"]), draw.task.label_names)
    failures = [*prepared.method.warnings(records), *learning]
    warnings = [*truncations(draw.reports), *(x._asdict() for x in failures)]
    groups = {name: each for name, each in groups.items() if each}
    return Result(prepared.seed, model, learnt, scores, groups, found, list(records), dict(seconds), warnings)
