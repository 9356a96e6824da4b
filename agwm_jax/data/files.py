"""Tables in files: JSON Lines, CSV, TSV and Parquet, read and written row by row with the place of every fault."""

import csv
import difflib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from agwm_jax.data.wording import listed, normal_form, quoted
from agwm_jax.errors import AgwmError

# The `datasets` builders of text formats are not used, for they change what a user wrote, also where the features are
# given: "2024-01-31" becomes "2024-01-31 00:00:00", a row that is too short is filled up, in rows that are all too long
# every text moves by one column, and a bad file is named without a line. For Parquet the builder takes the file's name
# for a pattern and an empty file for a damaged one (all in tests/data/test_builders.py).
_SEPARATORS = (";", "\t", "|", ",")
_PANDAS = 'from pandas, write it with to_json(path, orient="records", lines=True)'


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

    @classmethod
    def of(cls, source: str, rows: datasets.Dataset) -> "Table":
        """The table that a data set holds."""
        kinds = {name: kind for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)}
        names = {name: tuple(kind.names) for name, kind in kinds.items()}
        return cls(source, "row", range(1, len(rows) + 1), rows.to_dict(), names)

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
                f"{path}, line {number}: not valid JSON ({detail}); one JSON object a line was expected ({_PANDAS})."
            ) from None
        if not isinstance(row, dict):
            raise AgwmError(
                f"{path}, line {number}: a JSON {type(row).__name__}, one JSON object a line was expected "
                f'(such as {{"sentence": "...", "label": 0}}; {_PANDAS}).'
            )
        numbers.append(number)
        rows.append(row)
    if len(rows) == 1 and rows[0] and all(isinstance(value, dict | list) for value in rows[0].values()):
        raise AgwmError(f"{path} holds columns, one JSON object a line was expected: {_PANDAS}.")
    return _from_rows(path, numbers, rows)


def _csv_rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 131,072 characters
    reader, start = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True), 1
    try:
        for row in reader:
            yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise AgwmError(
            f"{path}, line {start}: not valid CSV ({error}); is a quote not closed, or not doubled?"
        ) from None


def _tsv_rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removesuffix("\r")
        yield number, line.split(separator) if line else []


def _refuse_another_separator(path: Path, header: str, separator: str) -> None:
    other = next((mark for mark in _SEPARATORS if mark in header), None)
    if other is None:
        return
    named = {mark: "a tab" if mark == "\t" else repr(mark) for mark in (other, separator)}
    remedy = f"set task.separator to {other!r}"
    if other == "\t":
        remedy = "save it as .tsv"
    elif path.suffix.lower() == ".tsv":
        remedy = "save it as .csv" if other == "," else f"save it as .csv and {remedy}"
    raise AgwmError(
        f"{path}: the header {quoted(header)} looks separated by {named[other]}, not by {named[separator]}; {remedy}."
    )


def _read_separated(path: Path, separator: str) -> Table:
    split = _tsv_rows if path.suffix.lower() == ".tsv" else _csv_rows
    lines = split(path, _decode(path), separator)
    header = next(row for _, row in lines if row)
    if len(header) == 1:
        _refuse_another_separator(path, header[0], separator)
    # A spreadsheet writes empty columns without a name; a single one without a name is pandas' row numbers.
    unnamed = sum(not name.strip() for name in header) > 1
    named = [index for index, name in enumerate(header) if name.strip() or not unnamed]
    names = [header[index] for index in named]
    if not names:
        raise AgwmError(f"{path}: the header names no column.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise AgwmError(f"{path}: the header names the column {listed(repeated)} more than once.")
    numbers, rows = [], []
    for number, row in lines:
        if not row:
            continue
        if row == header and len(header) > 1:
            raise AgwmError(f"{path}, line {number}: the header again; are these two files in one? Remove the line.")
        if len(row) <= named[-1] or any(row[len(header) :]):
            raise AgwmError(
                f"{path}, line {number}: {len(row)} fields, the header has {len(header)} ({listed(names)})."
            )
        numbers.append(number)
        # An empty field is the only way these formats have to leave a value out.
        rows.append({header[index]: row[index] if row[index] != "" else None for index in named})
    if not rows:
        raise AgwmError(f"{path} has a header and no rows.")
    return _from_rows(path, numbers, rows)


def _read_parquet(path: Path) -> Table:
    if not path.exists():
        raise AgwmError(f"There is no file {path}.")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = datasets.Dataset(file.read())
    except OSError as error:
        raise AgwmError(f"{path} cannot be read: {error.strerror or 'not a Parquet file'}.") from None
    except pyarrow.ArrowException:
        raise AgwmError(f"{path} is not a Parquet file, or is damaged.") from None
    if not len(rows):
        raise AgwmError(f"{path} has no rows.")
    return Table.of(str(path), rows)


def read_table(file: str | os.PathLike[str], *, separator: str = ",") -> Table:
    """Read a table by the extension of its name.

    JSON Lines: one object a line, lines end with a line feed only. CSV: quotes as RFC 4180. TSV: tab, no quoting at
    all, quote characters are text. Both start with a header, columns without a name are left out where there are
    several, and an empty field is a missing value. All are UTF-8.

    Args:
      separator: between the fields of a .csv file.

    Raises:
      AgwmError: missing or empty file, unknown extension, undecodable bytes, another separator, a bad line (with its
        number).
    """
    path = Path(file)
    if path.is_dir():
        raise AgwmError(f"{path} is a folder, a file was expected.")
    read, _ = _FORMATS[check_extension(path)]
    return read(path, separator)


def check_columns(there: Sequence[str], wanted: Sequence[str], source: str) -> list[str]:
    """The wanted columns by the names that they have there, which may be in another Unicode form.

    Raises:
      AgwmError: one is missing; the columns there and the nearest name are in the sentence.
    """
    by_form = {normal_form(name): name for name in there}
    for name in wanted:
        if normal_form(name) not in by_form:
            near = difflib.get_close_matches(name, there, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise AgwmError(f"{source} has no column {name!r}: its columns are {listed(there)}{hint}")
    return [by_form[normal_form(name)] for name in wanted]


def check_extension(file: str | os.PathLike[str]) -> str:
    """The lower-cased extension of a table's name, or an error that lists those that can be read and written."""
    path = Path(file)
    extension = path.suffix.lower()
    if extension not in _FORMATS:
        raise AgwmError(f"{path}: the extension {extension!r} is none of {', '.join(_FORMATS)}.")
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


Format = tuple[Callable[[Path, str], Table], Callable[[dict[str, list[Any]]], bytes]]
_JSONL: Format = (lambda path, _: _read_jsonl(path)), _jsonl_bytes
_FORMATS: dict[str, Format] = {
    ".jsonl": _JSONL,
    ".ndjson": _JSONL,
    ".json": _JSONL,
    ".csv": (_read_separated, _csv_bytes),
    ".tsv": ((lambda path, _: _read_separated(path, "\t")), _tsv_bytes),
    ".parquet": ((lambda path, _: _read_parquet(path)), _parquet_bytes),
}
"""How a table is read, given the separator of a .csv file, and written, by extension."""


def write_table(file: str | os.PathLike[str], columns: dict[str, list[Any]]) -> None:
    """Write a table by the extension of its name; the file appears whole or not at all.

    Raises:
      AgwmError: unknown extension, a value that the format cannot hold, a folder that is missing, full or read-only.
    """
    path = Path(file)
    _, to_bytes = _FORMATS[check_extension(path)]
    content = to_bytes(columns)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise AgwmError(f"{path} cannot be written: {error.strerror}.") from None
