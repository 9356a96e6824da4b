"""Which runs may be compared: those of one task, model, training-set size and data settings, method by method."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from agwm_jax.errors import AgwmError
from agwm_jax.report.runs import ReportWarning, Run, read_run

# Settings that belong to a method name a variant of it; all others (but the bookkeeping) separate comparisons.
_METHOD_SECTIONS = ("method", "finetune")
_BOOKKEEPING = ("seed", "output", "run", "mesh")
_IN_TITLE = ("task.name", "task.train_size", "model.path", "method.name")


class Comparison(NamedTuple):
    """Runs that may be compared; `methods` maps a method, or variant of one, to its runs sorted by seed."""

    task: str
    title: str
    slug: str
    metric: str
    split: str
    methods: dict[str, list[Run]]
    differing: dict[str, dict[str, str]]  # finetune setting -> method -> value, where the methods do not share it
    baseline: str
    """Name of the method that the others are compared with."""

    def is_baseline(self, method: str) -> bool:
        """Whether `method` is the baseline or a variant of it."""
        return self.methods[method][0].method == self.baseline

    def rival(self, method: str) -> str | None:
        """The variant of the baseline to compare `method` with: the only one, or that with its finetune settings."""
        rivals = [name for name in self.methods if self.is_baseline(name)]
        if len(rivals) == 1:
            return rivals[0]
        own = _finetune(self.methods[method][0])
        return next((name for name in rivals if _finetune(self.methods[name][0]) == own), None)


class Collection(NamedTuple):
    """All run folders found: comparisons of finished runs, the unfinished ones, and what was odd about them."""

    comparisons: list[Comparison]
    unfinished: list[Run]
    warnings: list[ReportWarning]

    @property
    def methods(self) -> list[str]:
        """All methods of all comparisons in the order of tables and legends."""
        order = {method: not each.is_baseline(method) for each in self.comparisons for method in each.methods}
        return sorted(order, key=lambda method: (order[method], method))


def collect(paths: Iterable[Path], *, baseline: str = "vanilla") -> Collection:
    """The run folders under `paths` (a run folder holds a config.yaml), and which of the finished ones compare.

    Args:
        paths: run folders, or folders that hold them at any depth.
        baseline: the method that the others are compared with.

    Raises:
        AgwmError: a path that is not there, no run folder, no finished run, or a file that cannot be read.
    """
    paths = [Path(path) for path in paths]
    runs, warnings = [], []
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise AgwmError(f"{path} is not a folder: give run folders, or folders that hold run folders.")
        for file in path.rglob("config.yaml"):
            found.setdefault(file.parent.resolve(), file.parent)
    for folder in sorted(found.values()):
        run = read_run(folder)
        if isinstance(run, ReportWarning):
            warnings.append(run)
        else:
            runs.append(run)
    if not runs:
        where = ", ".join(str(path) for path in paths) or "no path was given"
        odd = "".join(f" {warning.message}" for warning in warnings[:1])
        raise AgwmError(
            f"No run folder found ({where}): a run folder holds a config.yaml, as `agwm train` writes it.{odd}"
        )
    finished, unfinished = [run for run in runs if run.result], [run for run in runs if not run.result]
    if not finished:
        names = ", ".join(str(run.folder) for run in unfinished[:5])
        raise AgwmError(
            f"None of the {len(unfinished)} runs found is finished ({names}): a finished run holds a result.json. "
            "Run the same `agwm train` command again; it continues where it stopped."
        )
    finished, more = _usable(finished)
    return Collection(_compare(finished, baseline), unfinished, warnings + more)


def _usable(runs: Sequence[Run]) -> tuple[list[Run], list[ReportWarning]]:
    """Drops runs without a finite score and repeats of the same settings and seed, saying so."""
    kept: dict[object, Run] = {}
    warnings = []
    for run in runs:
        key = (_key(run), run.method, _settings(run, method=True), run.seed)
        if not math.isfinite(run.score):
            text = f"{run.folder} ended without a finite score; it counts in no mean."
            warnings.append(ReportWarning("score_not_finite", text))
        elif key in kept:
            text = f"{run.folder} repeats the settings and the seed of {kept[key].folder}; only the latter counts."
            warnings.append(ReportWarning("repeated_run", text))
        else:
            kept[key] = run
    if not kept:
        raise AgwmError(f"None of the {len(runs)} finished runs has a finite score: look at their metrics.jsonl.")
    return list(kept.values()), warnings


def _compare(runs: Sequence[Run], baseline: str) -> list[Comparison]:
    keyed: dict[tuple, list[Run]] = {}
    for run in runs:
        keyed.setdefault(_key(run), []).append(run)
    found: list[Comparison] = []
    for key, members in sorted(keyed.items()):
        task, model, size, settings = key
        # A model given by its folder is known by the last part of the path.
        title = f"{task}, {model.rstrip('/').rpartition('/')[2] or model}, {size} training examples"
        # Only the settings in which comparisons of one task, model and size differ are worth a reader's time.
        differing = _differing([dict(other[3]) for other in keyed if other[:3] == key[:3]])
        if differing:
            title += " (" + ", ".join(f"{name} = {dict(settings).get(name, 'absent')}" for name in differing) + ")"
        methods: dict[str, list[Run]] = {}
        names = _variant_names(members)
        for run, name in sorted(
            zip(members, names, strict=True), key=lambda pair: (pair[0].method != baseline, pair[1], pair[0].seed)
        ):
            methods.setdefault(name, []).append(run)
        stem = "".join(c if c.isalnum() else "_" for c in f"{task}-{size}")
        repeats = sum(each.slug.rsplit(".")[0] == stem for each in found)
        slug = f"{stem}.{repeats + 1}" if repeats else stem
        own = {name: _finetune(runs[0]) for name, runs in methods.items()}
        unequal = {
            key: {name: settings.get(key, "absent") for name, settings in own.items()}
            for key in _differing(list(own.values()))
        }
        metric, split = (members[0].result.get(name, "?") for name in ("metric", "split"))
        found.append(Comparison(task, title, slug, metric, split, methods, unequal, baseline))
    return found


def _variant_names(runs: Sequence[Run]) -> list[str]:
    """Each run's method, with the settings of its own in which the runs of that method differ: agwm (rank = 2)."""
    names = []
    for run in runs:
        own = dict(_settings(run, method=True))
        keys = _differing([dict(_settings(other, method=True)) for other in runs if other.method == run.method])
        tails = [key.rpartition(".")[2] for key in keys]
        words = [tail if tails.count(tail) == 1 else key for key, tail in zip(keys, tails, strict=True)]
        text = ", ".join(f"{word} = {own.get(key, 'absent')}" for word, key in zip(words, keys, strict=True))
        names.append(f"{run.method} ({text})" if text else run.method)
    return names


def _finetune(run: Run) -> dict[str, str]:
    return {key: value for key, value in run.config.items() if key.startswith("finetune.")}


def _differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    keys = sorted({key for each in settings for key in each})
    return [key for key in keys if len({each.get(key) for each in settings}) > 1]


def _key(run: Run) -> tuple[str, str, str, tuple[tuple[str, str], ...]]:
    return run.task, run.model, run.train_size, _settings(run, method=False)


def _settings(run: Run, *, method: bool) -> tuple[tuple[str, str], ...]:
    """The settings that separate variants of one method (`method`) or those that separate comparisons, sorted."""
    items = []
    for key, value in run.config.items():
        section = key.split(".")[0]
        if section not in _BOOKKEEPING and key not in _IN_TITLE and (section in _METHOD_SECTIONS) == method:
            items.append((key, value))
    return tuple(sorted(items))
