"""Tables in files: JSON Lines, CSV, TSV and Parquet, read and written row by row with the place of every fault."""

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from agwm_jax.errors import AgwmError

# The `datasets` readers of text formats are not used: they turn a column of ISO dates into timestamps and the text "NA"
# into a missing value, name no line when a file is bad, and cache a copy of every file outside the user's folder.


class Table(NamedTuple):
    """The rows of one file, or of one split of a hub data set.

    Attributes:
      source: how an error names it, a path or "data set, split".
      unit: "line" (counted from 1, header included) or "row" (counted from 1).
      numbers: the line or row number of each row.
      columns: values by column name; a value that the file does not give is None.
      class_names: the classes of a column whose type names them (Parquet written by `datasets`, hub data sets).
    """

    source: str
    unit: str
    numbers: Sequence[int]
    columns: dict[str, list[Any]]
    class_names: dict[str, tuple[str, ...]]

    def place(self, row: int) -> str:
        return f"{self.source}, {self.unit} {self.numbers[row]}"


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise AgwmError(f"There is no file {path}.") from None
    except OSError as error:
        raise AgwmError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        text = content.decode("utf-8-sig")  # Excel starts a UTF-8 file with a byte order mark
    except UnicodeDecodeError as error:
        if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise AgwmError(f"{path} is UTF-16, UTF-8 was expected: save it as UTF-8.") from None
        line = content.count(b"\n", 0, error.start) + 1
        raise AgwmError(
            f"{path}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8; save the file as UTF-8."
        ) from None
    if not text.strip():
        raise AgwmError(f"{path} is empty.")
    return text


def _from_rows(path: Path, numbers: list[int], rows: list[dict[str, Any]]) -> Table:
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), "line", numbers, {name: [row.get(name) for row in rows] for name in names}, {})


def _read_jsonl(path: Path) -> Table:
    text, numbers, rows = _decode(path), [], []
    # On "\n" only: splitlines would also cut inside a text at U+2028 and other characters that JSON allows there.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            detail = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise AgwmError(
                f"{path}, line {number}: not valid JSON ({detail}); one JSON object a line was expected."
            ) from None
        if not isinstance(row, dict):
            raise AgwmError(
                f"{path}, line {number}: a JSON {type(row).__name__}, one JSON object a line was expected "
                '(such as {"sentence": "...", "label": 0}).'
            )
        numbers.append(number)
        rows.append(row)
    return _from_rows(path, numbers, rows)


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 131,072 characters
    reader, start = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for row in reader:
            yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise AgwmError(
            f"{path}, line {start}: not valid CSV ({error}); is a quote not closed, or not doubled?"
        ) from None


def _tsv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        yield number, line.split("\t") if line else []


def _read_separated(path: Path, split: Callable[[Path, str], Iterator[tuple[int, list[str]]]]) -> Table:
    lines = split(path, _decode(path))
    header = next(row for _, row in lines if row)
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise AgwmError(f"{path}: the header names the column {', '.join(map(repr, repeated))} more than once.")
    numbers, rows = [], []
    for number, row in lines:
        if not row:
            continue
        if len(row) != len(header):
            raise AgwmError(
                f"{path}, line {number}: {len(row)} fields, the header has {len(header)} ({', '.join(header)})."
            )
        numbers.append(number)
        # An empty field is the only way these formats have to leave a value out.
        rows.append({name: value if value != "" else None for name, value in zip(header, row, strict=True)})
    if not rows:
        raise AgwmError(f"{path} has a header and no rows.")
    return _from_rows(path, numbers, rows)


def _read_parquet(path: Path) -> Table:
    if not path.exists():
        raise AgwmError(f"There is no file {path}.")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except OSError as error:
        raise AgwmError(f"{path} cannot be read: {error.strerror or 'not a Parquet file'}.") from None
    except pyarrow.ArrowException:
        raise AgwmError(f"{path} is not a Parquet file, or is damaged.") from None
    if not table.num_rows:
        raise AgwmError(f"{path} has no rows.")
    features = datasets.Features.from_arrow_schema(table.schema)
    names = {name: tuple(kind.names) for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)}
    return Table(str(path), "row", range(1, table.num_rows + 1), table.to_pydict(), names)


_READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_jsonl,
    ".csv": lambda path: _read_separated(path, _csv_rows),
    ".tsv": lambda path: _read_separated(path, _tsv_rows),
    ".parquet": _read_parquet,
}


def read_table(file: str | os.PathLike[str]) -> Table:
    """Read a table by the extension of its name.

    JSON Lines: one object a line, lines end with a line feed only. CSV: comma, quotes as RFC 4180. TSV: tab, no
    quoting at all, quote characters are text. Both start with a header; an empty field is a missing value. All are
    UTF-8.

    Raises:
      AgwmError: missing or empty file, unknown extension, undecodable bytes, a bad line (with its number).
    """
    path = Path(file)
    if path.is_dir():
        raise AgwmError(f"{path} is a folder, a file was expected.")
    return _READERS[check_extension(path)](path)


def check_extension(file: str | os.PathLike[str]) -> str:
    """The lower-cased extension of a table's name, or an error that lists those that can be read and written."""
    path = Path(file)
    extension = path.suffix.lower()
    if extension not in _READERS:
        raise AgwmError(f"{path}: the extension {extension!r} is none of {', '.join(_READERS)}.")
    return extension


def _jsonl_bytes(columns: dict[str, list[Any]]) -> bytes:
    rows = zip(*columns.values(), strict=True)
    lines = [json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False, default=str) + "\n" for row in rows]
    return "".join(lines).encode()


def _csv_bytes(columns: dict[str, list[Any]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return stream.getvalue().encode()


def _tsv_bytes(columns: dict[str, list[Any]]) -> bytes:
    lines = []
    for row in (tuple(columns), *zip(*columns.values(), strict=True)):
        fields = ["" if value is None else str(value) for value in row]
        bad = next((field for field in fields if any(mark in field for mark in "\t\n\r")), None)
        if bad is not None:
            raise AgwmError(
                f"A TSV file cannot hold a tab or a line end, as {bad[:40]!r} has: write .csv or .jsonl instead."
            )
        lines.append("\t".join(fields) + "\n")
    return "".join(lines).encode()


def _parquet_bytes(columns: dict[str, list[Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    except pyarrow.ArrowException as error:
        raise AgwmError(f"These columns do not fit into Parquet ({error}): write .jsonl instead.") from None
    return sink.getvalue().to_pybytes()


_WRITERS: dict[str, Callable[[dict[str, list[Any]]], bytes]] = {
    ".jsonl": _jsonl_bytes,
    ".ndjson": _jsonl_bytes,
    ".json": _jsonl_bytes,
    ".csv": _csv_bytes,
    ".tsv": _tsv_bytes,
    ".parquet": _parquet_bytes,
}


def write_table(file: str | os.PathLike[str], columns: dict[str, list[Any]]) -> None:
    """Write a table by the extension of its name; the file appears whole or not at all.

    Raises:
      AgwmError: unknown extension, a value that the format cannot hold, a folder that is missing, full or read-only.
    """
    path = Path(file)
    content = _WRITERS[check_extension(path)](columns)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise AgwmError(f"{path} cannot be written: {error.strerror}.") from None
