"""Registries and choices: what registers itself, from inside and outside, and which settings it gets."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import grimp
import jax
import pytest
from pydantic import Field, ValidationError

from agwm_jax.data.sources.base import TASK_SOURCES
from agwm_jax.errors import AgwmError
from agwm_jax.methods.interface import METHODS, MethodSettings
from agwm_jax.metrics import METRICS
from agwm_jax.models.family import FAMILIES
from agwm_jax.registry import Registry
from agwm_jax.section import Choice, Section, section_of
from agwm_jax.settings import all_settings, dump_config, load_config

BOLTS: Registry[Any] = Registry("bolt", "bolts", "json")  # a package whose files register nothing
TOOLS: Registry[Any] = Registry("tool", "tools", "json")


class Tool(NamedTuple):
    made_of: dict


@BOLTS.register("short", cost="1")
def short(*, length: float = 1.0) -> Tool:
    """A short bolt. It holds.

    Args:
        length: in mm,
            below 10.

    Raises:
        AgwmError: too long.
    """
    if length > 10:
        raise AgwmError(f"short(length={length}): expected at most 10.")
    return Tool({"length": length})


@TOOLS.register("wrench")
def wrench(
    *,
    bolt: Annotated[Tool, BOLTS],
    spare: "Annotated[Tool, BOLTS]" = "short",  # type: ignore[assignment]
    sizes: Annotated[tuple[int, ...], Field(strict=False)] = (1, 2),
    mode: Literal["fast", "slow"] = "fast",
    on_turn: Callable[[int], int] | None = None,
    key: jax.Array | None = None,
) -> Tool:
    """Turns."""
    return Tool({"bolt": bolt, "spare": spare, "sizes": sizes, "mode": mode, "on_turn": on_turn, "key": key})


class Box(Section):
    tool: Annotated[Any, Choice(TOOLS, default="wrench", key="kind")] = Field(default={"bolt": "short"})


@pytest.fixture
def third_party():
    """Registers a method as a program that uses the library would, and takes it out again."""

    @METHODS.register("third", cost="2")
    class Third(MethodSettings):
        """A method from elsewhere."""

        name: Literal["third"] = Field(default="third", description="fine-tuning method")
        strength: float = Field(default=0.5, ge=0, le=1, description="how strong")

    yield Third
    del METHODS._entries["third"]


def test_what_does_not_exist_is_refused_with_the_nearest_name():
    with pytest.raises(AgwmError, match=r"there is no bolt 'shrot'; did you mean short\? There are short"):
        BOLTS["shrot"]


def test_a_name_is_given_once_and_may_be_registered_again_by_the_same_thing():
    BOLTS.register("short")(short)
    with pytest.raises(AgwmError, match=r"the bolt 'short' is registered twice, by \S+short and \S+wrench"):
        BOLTS.register("short")(wrench)


def test_an_entry_carries_its_facts_and_the_first_sentence_of_its_docstring():
    entry = Registry("x", "xs", "json")
    entry.register("short", cost="1")(short)
    assert (entry["short"].summary, entry["short"].facts) == ("A short bolt.", {"cost": "1"})


def test_the_settings_of_a_factory_are_its_parameters():
    section = section_of(short, "short")
    field = section.model_fields["length"]
    assert (field.default, field.description) == (1.0, "in mm, below 10")
    assert section(length=3.0).build() == Tool({"length": 3.0})
    with pytest.raises(ValidationError, match="valid number"):
        section(length="3")
    with pytest.raises(ValidationError, match=r"short\(length=11.0\): expected at most 10"):
        section(length=11.0)


def test_choices_nest_and_what_no_config_can_write_keeps_its_default():
    box = Box.model_validate({"tool": {"bolt": {"name": "short", "length": 2.0}, "sizes": [3]}})
    assert "on_turn" not in type(box.tool).model_fields
    parts = {"bolt": Tool({"length": 2.0}), "spare": Tool({"length": 1.0}), "sizes": (3,), "mode": "fast"}
    assert box.tool.build() == Tool({**parts, "on_turn": None, "key": None})
    assert hash(box) == hash(box.model_copy())


def test_a_parameter_that_no_config_can_write_needs_a_default():
    def bad(*, act: Callable[[int], int]):
        """Bad."""

    with pytest.raises(AgwmError, match=r"bad\(act\): no config can write"):
        section_of(bad, "bad")


@pytest.mark.parametrize("mode", ["python", "json"])
def test_a_choice_comes_back_from_its_dump(mode):
    box = Box.model_validate({"tool": {"kind": "wrench", "bolt": {"length": 2.0}} | {"bolt": "short", "mode": "slow"}})
    dumped = box.model_dump(mode=mode)
    assert dumped["tool"]["kind"] == "wrench"
    assert dumped["tool"]["bolt"] == {"name": "short", "length": 1.0}
    assert Box.model_validate(dumped) == box
    assert Box.model_validate({"tool": box.tool}) == box


@pytest.mark.parametrize("tool", [{"kind": "hammer"}, "hammer", 3, {"bolt": {}}, {}, {"bolt": {"name": ["short"]}}])
def test_what_cannot_be_chosen_is_refused(tool):
    with pytest.raises(ValidationError):
        Box.model_validate({"tool": tool})


def test_a_section_given_in_part_leaves_the_rest_of_the_fields_default():
    class Inner(Section):
        a: int = 1
        b: int = 2

    class Outer(Section):
        inner: Inner = Field(default=Inner(a=5))

    assert Outer.model_validate({"inner": {"b": 7}}).inner == Inner(a=5, b=7)
    assert Outer().inner == Inner(a=5)


def test_a_method_registered_in_code_is_read_listed_and_dumped(third_party, tmp_path):
    config = load_config(None, ["--method", "third", "--method.strength", "0.25"])
    assert config.method == third_party(strength=0.25)
    path = tmp_path / "c.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    (setting,) = [setting for setting in all_settings() if setting.needs == "method.name=third"]
    assert (setting.path, setting.default, setting.description) == ("method.strength", "0.5", "how strong")
    with pytest.raises(AgwmError, match=r"method\.strength: got 2 \(a whole number\); allowed: a number >= 0 and <= 1"):
        load_config(None, ["--method", "third", "--method.strength", "2"])


def install(folder: Path, source: str) -> None:
    """A package with an entry point, as pip leaves it."""
    (folder / "elsewhere.py").write_text(source)
    info = folder / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[agwm_jax.methods]\nthird = elsewhere\n")


def test_a_package_adds_a_method_by_an_entry_point(tmp_path):
    install(
        tmp_path,
        "from typing import Literal\n"
        "from agwm_jax.methods.interface import METHODS, MethodSettings\n"
        "@METHODS.register('third', cost='2')\n"
        "class Third(MethodSettings):\n"
        "    '''A method from elsewhere.'''\n"
        "    name: Literal['third'] = 'third'\n",
    )
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from agwm_jax.cli import main\n"
        "from agwm_jax.settings import load_config\n"
        "assert type(load_config(None, ['--method', 'third']).method).__module__ == 'elsewhere'\n"
        "main(['list', 'methods'])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.stderr == ""
    assert [line.split(maxsplit=1) for line in answer.stdout.splitlines() if line.startswith("third")] == [
        ["third", "A method from elsewhere. (cost: 2)"]
    ]


def test_an_entry_point_that_cannot_be_loaded_is_named(tmp_path, monkeypatch):
    install(tmp_path, "import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    registry: Registry[Any] = Registry("method", "methods", "json")
    with pytest.raises(AgwmError, match="the method 'third' of another package cannot be loaded: elsewhere: No module"):
        list(registry)
    with pytest.raises(AgwmError, match="cannot be loaded"):  # and not half a registry the second time
        list(registry)


def test_no_file_outside_its_folder_imports_a_method_family_source_or_metric():
    graph = grimp.build_graph("agwm_jax", exclude_type_checking_imports=True, cache_dir=None)
    found = []
    for registry in (METHODS, FAMILIES, TASK_SOURCES, METRICS):
        homes = {getattr(entry.value, "__module__", "") for entry in registry.entries()} & graph.modules
        assert homes
        for home in homes:
            importers = graph.find_modules_that_directly_import(home)
            found += [f"{name} imports {home}" for name in importers if not name.startswith(home.rpartition(".")[0])]
    assert found == []
