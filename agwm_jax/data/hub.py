"""Data sets of the hub, and folders in their layout, as the `datasets` library loads them."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from agwm_jax.data.files import Table, check_columns
from agwm_jax.errors import AgwmError


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the library's progress bars."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def hub_tables(
    path: str, name: str | None, *, revision: str | None, splits: Mapping[str, str], columns: Sequence[str]
) -> dict[str, Table]:
    """Tables of a data set of the hub, or of a local folder in its layout.

    Args:
      path, name, revision: as for `datasets.load_dataset`; name is the configuration. Code of a data set is never run.
      splits: our split name -> theirs.
      columns: those to read.

    Raises:
      AgwmError: no network, no such data set, configuration, split or column.
    """
    what = f"The data set {path}" + (f" ({name})" if name else "")
    loaded = _load(what, path, name, revision=revision)
    tables = {}
    for ours, theirs in splits.items():
        if theirs not in loaded:
            raise AgwmError(f"The data set {path} has no split {theirs!r}: its splits are {', '.join(loaded)}.")
        source = f"{path}, split {theirs}"
        there = check_columns(loaded[theirs].column_names, columns, source)
        tables[ours] = Table.of(source, loaded[theirs].select_columns(list(dict.fromkeys(there))))
    return tables


def _load(what: str, path: str, name: str | None, **options: Any) -> dict[str, datasets.Dataset]:
    try:
        with quietly(), contextlib.ExitStack() as stack:
            if Path(path).is_dir():  # nothing of a local folder is worth a copy in the user's cache
                cache = stack.enter_context(tempfile.TemporaryDirectory())
                options |= {"cache_dir": cache, "keep_in_memory": True}
            return dict(datasets.load_dataset(path, name, **options))
    except ConnectionError as error:
        raise AgwmError(
            f"{what} is not in the local cache and the hub cannot be reached: connect to the network once "
            "(later runs use the cache), or give local files."
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        raise AgwmError(
            f"{what} is not on the hub at this name and revision, or needs a login (`hf auth login`)."
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise AgwmError(f"{what} cannot be loaded: {reason[:300]}") from error
