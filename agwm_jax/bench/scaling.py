"""What larger models need on larger meshes, by the compiler: programs compiled for shapes, on fake devices."""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np

from agwm_jax.bench.programs import Shape, method, prepare
from agwm_jax.engine.group import Group, Layout, Member
from agwm_jax.engine.lanes import Lanes, Programs
from agwm_jax.engine.memory import stage_bytes
from agwm_jax.engine.sharding import make_placement
from agwm_jax.models.family import Options
from agwm_jax.report.table import markdown_table

_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"f64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "pred": 1, "s8": 1, "u8": 1}


class Row(NamedTuple):
    """One method's dearest stage, for one model on one mesh."""

    model: str
    method: str
    mesh: str
    stage: str
    gigabytes: float
    """That one device holds at the peak."""
    collectives: dict[str, float]
    """Gigabytes of the results of each kind of exchange in a step, as the program's text has them."""
    compile_seconds: float


def rows(
    models: Mapping[str, Shape],
    methods: Mapping[str, Mapping[str, Any]],
    meshes: Mapping[str, Mapping[str, Any]],
    options: Options,
) -> Iterator[Row]:
    """Compile every method for every model and mesh; nothing is allocated and nothing runs.

    Args:
        models: shapes by name.
        methods: settings by name.
        meshes: arguments of `make_placement` but for `seed`, by name; of devices that JAX has, real or fake.
        options: how the models compute.
    """
    for (model, shape), (name, settings), (mesh, sizes) in product(models.items(), methods.items(), meshes.items()):
        prepared = prepare(shape, options, abstract=True)
        built = method(prepared, settings)
        examples = prepared.setup.num_examples
        columns = {key: np.zeros((examples, shape.length), np.int32) for key in ("input_ids", "attention_mask")}
        data = {**columns, "labels": np.zeros(examples, np.int32)}
        member = Member(0, built, prepared.params, data, jax.random.key(0))
        placement = make_placement(seed=1, **sizes)
        began = time.perf_counter()
        with jax.set_mesh(placement.mesh):
            group, programs = Group([member], Layout(placement), prepared.model.weights), Programs()
            found = [(stage_bytes(group, number, programs, 1)[0], number) for number in range(len(group.stages))]
            most, number = max(found)
            lanes = Lanes(group, number)
            text = lanes.compile(programs, 1).advance.as_text()  # type: ignore[attr-defined]
        yield Row(model, name, mesh, lanes.name, most / 1e9, _exchanged(text), time.perf_counter() - began)


def _exchanged(text: str) -> dict[str, float]:
    """Gigabytes that collective operations of a compiled program give, each counted as often as it stands there.

    What stands in the loop over layers is one layer's.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        match = re.search(r"= (.*?) (" + "|".join(_COLLECTIVES) + r")(?:-start)?\(", line)
        if match:
            sizes = re.findall(r"(\w+)\[([\d,]*)\]", match.group(1))
            size = sum(
                _BYTES.get(kind, 4) * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in sizes
            )
            found[match.group(2)] = found.get(match.group(2), 0.0) + size / 1e9
    return found


def markdown(found: Sequence[Row]) -> str:
    """A table of memory: a row a model and method, a column a mesh."""
    cells: dict[str, dict[str, str]] = {}
    for row in found:
        name = f"{row.model}, {row.method}"
        cells.setdefault(name, {"model, method": name})[row.mesh] = f"{row.gigabytes:.3g}"
    return markdown_table(list(cells.values()))
