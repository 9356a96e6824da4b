"""Fails the build of the site for a public name that no reference page shows, or that has no docstring."""

import importlib
import inspect
import re
from pathlib import Path

from mkdocs.exceptions import PluginError


def on_pre_build(config, **kwargs) -> None:
    """Called by mkdocs before anything is built."""
    package = importlib.import_module("agwm_jax")
    pages = "".join(page.read_text() for page in (Path(config["docs_dir"]) / "api").glob("*.md"))
    shown = set(re.findall(r"^::: agwm_jax\.([\w.]+)$", pages, re.MULTILINE))
    homes = {name: f"{module}.{name}" for module, names in package._HOME.items() for name in names.split()}
    faults = []
    for name in package.__all__:
        if homes.get(name, package._MODULES.get(name)) not in shown:
            faults.append(f"{name} is on no page of docs/api")
        value = getattr(package, name)
        if (inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value)) and not value.__doc__:
            faults.append(f"{name} has no docstring")
    if faults:
        raise PluginError("public names: " + "; ".join(faults))
