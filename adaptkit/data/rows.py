"""Rows of data files, each with its place for error messages.

    source               content                                         place
    .jsonl, .ndjson      one JSON object per line                        file, line N
    .json                a list of objects, or {"data": [...]}           file, row N
    .csv, .tsv           a header, then cells, all read as text          file, line N
    .parquet             read with pyarrow                               file, row N
    .jsonl.gz            any of these but Parquet, gzip-compressed       the same
    org/name             a dataset on the Hub, read with datasets        name, row N
    org/name/config@revision:split                                       config, revision and split are optional

CSV cells are kept as written, including "NA" and "007", and a missing cell is an error; readers that infer types would
change or hide these.
"""

import codecs
import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptkit.arguments import path_hint
from adaptkit.data.values import parse, repeated
from adaptkit.errors import DataError, UsageError, install_hint
from adaptkit.wording import counted

Row = Mapping[str, Any]
Located = tuple[str, Row]

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_GZIP_SUFFIX, _GZIP = ".gz", b"\x1f\x8b"
_OTHER_FILES = (
    ".txt", ".text", ".md", ".xml", ".html", ".yaml", ".yml", ".xlsx", ".arrow", ".zip", ".tar", ".gz", ".bz2", ".zst",
)  # fmt: skip
"""Suffixes of files that are not read as rows, and of no dataset's name on the Hub."""
_SUFFIX_IN_A_FOLDER = re.compile(r"\.[A-Za-z]\w*")
"""What ends a file's name, if its folder exists: a dataset's name may end in a version, such as v1.5."""
_READ_ERRORS = (OSError, EOFError, zlib.error)
"""Exceptions raised by reading a file, compressed or not."""
_HUB = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<config>[\w.-]+))?"
    r"(?:@(?P<revision>[\w./+-]+))?(?::(?P<split>[\w.-]+))?",
    re.ASCII,
)
_LARGEST_CELL = (1 << 31) - 1
_LONGEST_LINE = 1 << 28
"""Limit on a line's bytes: a compressed file of megabytes can hold a line that exhausts memory."""
_BATCH_ROWS = 1024


def read_rows(source: Path | str) -> Iterator[Located]:
    """Read the rows of a file or of a dataset on the Hub.

    Yields:
        The place of a row, and the row.

    Raises:
        DataError: the source cannot be read, or a row is not an object; names the line or row.
        UsageError: a required package is not installed, or the Hub has no such dataset.
        AuthenticationError, NetworkError: the Hub refused or did not answer.
    """
    if is_on_hub(source):
        from adaptkit.data.hub_rows import read_hub_rows

        found = _HUB.fullmatch(str(source))
        return _filled(read_hub_rows(**(found.groupdict() if found else {})))
    file = Path(source)
    kind = _kind(file)
    if kind is None:
        known = ", ".join(_SUFFIXES)
        hint = "rename or convert it" if os.path.lexists(file) else "check the path: there is no such file"
        raise DataError(f"{file}: expected a data file ({known}) or org/name on the Hub", hint=hint)
    if file.is_fifo():  # it is hashed too: a second read would find nothing, or block
        raise DataError(f"{file}: is a pipe, which can be read only once", hint="save it in a file")
    if kind == ".parquet":
        return _filled(_parquet(file))
    return {".json": _document, ".csv": _cells, ".tsv": _cells}.get(kind, _lines)(file)


def holds_rows(file: Path | str) -> bool:
    """Return whether a file name has a suffix of a data file; case is ignored."""
    return _kind(file) is not None


def _kind(file: Path | str) -> str | None:
    """Return the suffix of a data file's name, without a final ``.gz``; None if it is not a data file."""
    inner, packed = os.path.splitext(str(file).lower())
    kind = os.path.splitext(inner)[1] if packed == _GZIP_SUFFIX else packed
    return kind if kind in _SUFFIXES and (packed, kind) != (_GZIP_SUFFIX, ".parquet") else None


def _opened(file: Path) -> io.BufferedIOBase:
    return gzip.open(file) if file.suffix.lower() == _GZIP_SUFFIX else file.open("rb")


def is_on_hub(source: Path | str) -> bool:
    """Return whether a source names a dataset on the Hub.

    An existing path means a file, and so does a file's suffix: else a misspelt path would be looked for on the Hub.
    """
    text = str(source)
    folder, suffix = os.path.dirname(text), "" if {"@", ":"}.intersection(text) else os.path.splitext(text)[1]
    is_file = suffix.lower() in _OTHER_FILES or (_SUFFIX_IN_A_FOLDER.fullmatch(suffix) and os.path.isdir(folder))
    return not (os.path.exists(text) or holds_rows(text) or is_file) and _HUB.fullmatch(text) is not None


def read_pieces(file: Path, size: int = -1) -> Iterator[tuple[str, bool]]:
    """Read a UTF-8 file, without a byte order mark, in pieces, each twice as long as the one before.

    Args:
        file: a text file.
        size: size of the first piece in bytes, larger than a byte order mark; -1 to read everything at once.

    Yields:
        A piece, and whether it is the last one.

    Raises:
        DataError: it cannot be read, or is not UTF-8; names the line.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    mark, line, is_last = "\ufeff", 1, False
    try:
        with _opened(file) as opened:
            while not is_last:
                raw = opened.read(size)
                is_last = size < 0 or len(raw) < size
                text = decoder.decode(raw, is_last).removeprefix(mark)
                yield text, is_last
                mark, line, size = "", line + text.count("\n"), 2 * size
    except _READ_ERRORS as error:
        raise _unreadable(file, error) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(file, line + error.object[: error.start].count(b"\n"), error) from error


def _lines(file: Path) -> Iterator[Located]:
    for number, line in enumerate(_text_lines(file), 1):
        where = f"{file}, line {number}"
        text = line.strip()
        if text:
            try:
                row = parse(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({error})", hint="write one JSON object per line") from error
            yield where, _object(row, where, "write one JSON object per line")


def _text_lines(file: Path) -> Iterator[str]:
    """Split at line feeds only, since JSON strings may contain other line separators unescaped."""
    number = 0
    try:
        with _opened(file) as opened:
            for number, line in enumerate(iter(lambda: opened.readline(_LONGEST_LINE + 1), b""), 1):
                if len(line) > _LONGEST_LINE:
                    raise DataError(f"{file}, line {number}: longer than 256 MiB", hint="put each row on its own line")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except _READ_ERRORS as error:
        raise _unreadable(file, error) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(file, number, error) from error


def _document(file: Path) -> Iterator[Located]:
    ((text, _),) = read_pieces(file)
    try:
        document = parse(text)
    except (ValueError, RecursionError) as error:
        if _is_object(text.lstrip().partition("\n")[0]):  # JSON lines under another name
            yield from _lines(file)
            return
        hint = "write a list of objects, or one object per line"
        raise DataError(f"{file}: not JSON ({error})", hint=hint) from error
    found = document.get("data") if isinstance(document, dict) else document
    if isinstance(document, dict) and not isinstance(found, list) and "\n" not in text.strip():  # a single JSON line
        yield from _lines(file)
        return
    if not isinstance(found, list):
        keys = f"the keys {', '.join(document)}" if isinstance(document, dict) else type(document).__name__
        hint = 'write [{...}, ...] or {"data": [{...}, ...]}'
        raise DataError(f"{file}: expected a list of rows, found {keys}", hint=hint)
    for number, row in enumerate(found, 1):
        where = f"{file}, row {number}"
        yield where, _object(row, where, "write a list of objects")


def _is_object(line: str) -> bool:
    try:
        return isinstance(parse(line), dict)
    except (ValueError, RecursionError):
        return False


def _cells(file: Path) -> Iterator[Located]:
    header: list[str] = []
    for line, cells in _records(file, "\t" if _kind(file) == ".tsv" else ","):
        where = f"{file}, line {line}"
        if not header:
            header = cells
            _require_once(header, where)
            if len(header) == 1 and any(mark in header[0] for mark in ",;\t|"):
                hint = "separate cells by commas in .csv, by tabs in .tsv"
                raise DataError(f"{where}: found a single column, {header[0]!r}", hint=hint)
        elif len(cells) != len(header):
            raise DataError(
                f"{where}: expected {counted(len(header), 'cell')}, as in the header; found {len(cells)}",
                hint="quote cells that contain separators or line breaks",
            )
        else:
            yield where, dict(zip(header, cells, strict=True))


def _records(file: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield every non-empty record with the number of its first line."""
    lines = (part for line in _text_lines(file) for part in io.StringIO(line, newline=""))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        before, line = csv.field_size_limit(_LARGEST_CELL), reader.line_num + 1  # a global setting, so restored below
        try:
            cells = next(reader, None)
        except csv.Error as error:
            kind, hint = (_kind(file) or "")[1:], "quote cells that contain quotes or line breaks"
            raise DataError(f"{file}: not {kind} ({error})", hint=hint) from error
        finally:
            csv.field_size_limit(before)
        if cells is None:
            return
        if cells:
            yield line, cells


def _require_once(columns: Sequence[str], where: str) -> None:
    """Refuse columns of the same name: a row would have the cells of only one of them."""
    twice = repeated(columns)
    if twice is not None:
        raise DataError(f"{where}: two columns are named {twice!r}", hint="rename one of them")


def _parquet(file: Path) -> Iterator[Located]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{file}: Parquet needs the package pyarrow", hint=install_hint("train")) from error
    try:
        opened = file.open("rb")
    except OSError as error:
        raise _unreadable(file, error) from error
    number = 0
    try:
        with opened, parquet.ParquetFile(opened) as table:
            _require_once(table.schema_arrow.names, str(file))
            for batch in table.iter_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{file}, after row {number}: not Parquet ({error})", hint="write the file again") from error


def _filled(rows: Iterator[Located]) -> Iterator[Located]:
    """Leave the None fields of objects out of a table's rows: in a column, all objects have the same keys."""
    for where, row in rows:
        yield where, {name: _without_none(value) for name, value in row.items()}


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


def _object(row: Any, where: str, hint: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object, found {type(row).__name__}", hint=hint)
    return row


def _not_utf8(file: Path, line: int, error: UnicodeDecodeError) -> DataError:
    if line == 1 and error.object.startswith(_GZIP) and file.suffix.lower() != _GZIP_SUFFIX:
        return DataError(f"{file}: is compressed with gzip", hint=f"name it {file.name}.gz")
    return DataError(f"{file}, line {line}: not UTF-8 ({error.reason})", hint="save it as UTF-8")


def _unreadable(file: Path, error: Exception) -> DataError:
    if isinstance(error, gzip.BadGzipFile):
        hint = "name it without .gz, or copy it again"
        return DataError(f"{file}: is not compressed with gzip, or is damaged", hint=hint)
    hint = "copy it again" if isinstance(error, EOFError | zlib.error) else path_hint(file)
    return DataError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})", hint=hint)
