"""Named things of one kind: each is registered by the file that defines it, and no other file names it."""

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, TypeVar

from agwm_jax.errors import AgwmError, did_you_mean

T = TypeVar("T")


class Entry(NamedTuple):
    """One registered thing."""

    name: str
    value: Any
    """What was registered: a factory, a section of settings, a function."""
    facts: dict[str, Any]
    """What tables and help show of it, such as ``cost`` and ``paper``."""

    @property
    def summary(self) -> str:
        """The first sentence of its docstring, on one line."""
        text = " ".join((self.value.__doc__ or "").strip().split("\n\n")[0].split())
        return text.split(". ")[0].rstrip(".") + "."


class Registry(Generic[T]):
    """Things of one kind by name.

    The files of `package` are imported when a name is first asked for, so a new file registers itself by being there.
    An installed package adds its own by an entry point of the group ``agwm_jax.<plural>`` that leads to a module which
    calls `register`; code that is already running calls `register` itself.

    Args:
        kind: what one of them is called in a sentence, for example "method".
        plural: and several; names the entry-point group.
        package: dotted name of the folder whose files register themselves.
    """

    def __init__(self, kind: str, plural: str, package: str):
        """Nothing is imported yet."""
        self.kind, self.plural, self._package = kind, plural, package
        self._entries: dict[str, Entry] = {}
        self._searched = False

    def register(self, name: str, **facts: Any) -> Callable[[T], T]:
        """A decorator that registers what it decorates.

        Raises:
            AgwmError: another thing has that name.
        """

        def add(value: T) -> T:
            taken = self._entries.get(name)
            if taken is not None and _where(taken.value) != _where(value):
                raise AgwmError(
                    f"the {self.kind} {name!r} is registered twice, by {_where(taken.value)} and {_where(value)}: give "
                    "yours another name."
                )
            self._entries[name] = Entry(name, value, facts)
            return value

        return add

    def __getitem__(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
            AgwmError: there is none; the nearest name and all names are in the sentence.
        """
        self._search()
        if name not in self._entries:
            hint = did_you_mean(name, self._entries) or "."
            raise AgwmError(f"there is no {self.kind} {name!r}{hint} There are {', '.join(self)}.")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        """Names, sorted."""
        self._search()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        """How many there are."""
        self._search()
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        """Whether there is one of that name."""
        self._search()
        return name in self._entries

    def entries(self) -> tuple[Entry, ...]:
        """All of them, sorted by name."""
        return tuple(self[name] for name in self)

    def _search(self) -> None:
        if self._searched:
            return
        self._searched = True  # before the imports: a file that registers itself may ask for others
        try:
            self._import()
        except BaseException:
            self._searched = False
            raise

    def _import(self) -> None:
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
            importlib.import_module(f"{self._package}.{module.name}")
        for point in importlib.metadata.entry_points(group=f"agwm_jax.{self.plural}"):
            try:
                point.load()
            except ImportError as error:
                raise AgwmError(
                    f"the {self.kind} {point.name!r} of another package cannot be loaded: {point.value}: {error}; "
                    "repair or uninstall that package."
                ) from error


def _where(value: Any) -> str:
    return f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', value)}"
