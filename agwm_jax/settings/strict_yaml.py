"""YAML as a config means it: the scalars of YAML 1.2, no key twice, and nothing that runs code."""

import re
from typing import Any, ClassVar

import yaml


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of YAML 1.2: 2e-5 is a number, `no` and 1:30 are texts; a key given twice is refused."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                fault = f"the key {key} is given twice"
                raise yaml.constructor.ConstructorError(None, None, fault, key_node.start_mark)
            seen.add(key if isinstance(key, str) else None)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text exactly where `_Loader` would read it as something else."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # type: ignore[misc]

    def ignore_aliases(self, data):
        return True


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?((\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|\.(inf|nan))", list("-+.0123456789")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(str(loader.construct_scalar(node))))  # type: ignore[arg-type]


def parse(text: str) -> Any:
    """The value of a YAML text; raises YAMLError, or ValueError or RecursionError for absurd ones."""
    return yaml.load(text, _Loader)  # noqa: S506 (_Loader is a SafeLoader)


def dump(value: Any) -> str:
    """A value as a YAML text that `parse` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def one_line(value: Any) -> str:
    """A value on one line, as one would write it in a config."""
    value = list(value) if isinstance(value, tuple) else value
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")
