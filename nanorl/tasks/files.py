"""Files of data: rows of .jsonl, .parquet and .csv; by name for a task, by pattern for --data."""

import codecs
import csv
import glob
import gzip
import json
import os
import zlib
from contextlib import contextmanager


def load_rows(name, split, hub_id, hub_config=None):
    """Rows (dicts with the data set's own field names) of NANORL_DATA/<name>/<split>.jsonl, .parquet or .csv,
    else of the hub's data set. Raises ValueError that says both ways to get it."""
    root = os.environ.get("NANORL_DATA")
    for ending in READERS if root else ():
        path = os.path.join(root, name, split + ending)
        if os.path.exists(path):
            return [row for _, row in read_rows(path)]
    try:
        import datasets

        return list(datasets.load_dataset(hub_id, hub_config, split=split))
    except Exception as error:
        where = os.path.join(root or "$NANORL_DATA", name, split + ".jsonl")
        raise ValueError(
            f"data set {name!r}, split {split!r}, is not at hand: put it at {where}, or connect to the hub "
            f"once so that `datasets` can fetch {hub_id} ({type(error).__name__})"
        ) from None


def find_files(patterns):
    """'a.txt, more/**/*.jsonl' -> paths: the patterns' in turn, each one's sorted, no file twice. Raises ValueError for a
    pattern that finds none."""
    files = []
    for pattern in filter(None, map(str.strip, patterns.split(","))):
        named = os.path.expanduser(pattern)
        found = (
            [named]
            if os.path.isfile(named)
            else sorted(filter(os.path.isfile, glob.glob(named, recursive=True)))
        )
        if not found:
            remedy = (
                f"name its files, such as {os.path.join(pattern, '*.txt')}"
                if os.path.isdir(named)
                else "check the path (a * in it needs quotes)"
            )
            raise ValueError(f"--data: {pattern!r} is no file and finds none: {remedy}")
        files += found
    if not files:
        raise ValueError(f"--data={patterns!r} names no file")
    return list(dict.fromkeys(files))


def kind(path):
    """'x/a.jsonl.gz' -> '.jsonl'"""
    return os.path.splitext(path.removesuffix(".gz"))[1].lower()


@contextmanager
def open_bytes(path):
    """A file to read bytes from, a .gz unpacked. Raises ValueError where it cannot be read, then or later."""
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
            yield f
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def decode(data, place, bad=None):
    """UTF-8 bytes -> str. What is not UTF-8 becomes U+FFFD, and `bad`, a list, gets `place`; without a list it is refused."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if bad is None:
            raise ValueError(f"{place}: not UTF-8 ({error.reason}): convert the file") from None
        bad.append(place)
        return data.decode("utf-8", errors="replace")


def read_rows(path, only=None, bad=None):
    """Yield (place, row) of a file of rows, a few at a time: `place` names the row in messages, 'a.jsonl, line 3'; the row is a
    dict. only: the one field wanted; of parquet no other is then read, and its text comes as bytes. bad: see decode.
    Raises ValueError for a file of another kind, one that cannot be read, and a broken row."""
    if kind(path) not in READERS:
        raise ValueError(f"{path} is not a file of rows: convert it to one of {', '.join(READERS)}")
    with open_bytes(path) as f:
        yield from READERS[kind(path)](f, path, only, bad)


def _lines(f, path, bad):
    for number, line in enumerate(f, 1):
        yield decode(line.removeprefix(codecs.BOM_UTF8), f"{path}, line {number}", bad)


def _read_jsonl(f, path, only, bad):
    for number, line in enumerate(_lines(f, path, bad), 1):
        if line.strip():
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f'{place}: not an object: a row is written {{"field": value, ...}}'
                )
            yield place, row


def _read_csv(f, path, only, bad):
    csv.field_size_limit(2**31 - 1)  # the default refuses cells beyond 128 KB
    reader = csv.DictReader(_lines(f, path, bad))
    try:
        for row in reader:
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _read_parquet(f, path, only, bad):
    import pyarrow
    import pyarrow.parquet

    as_bytes = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(f)
        columns = [only] if only in file.schema_arrow.names else None
        for batch in file.iter_batches(256, columns=columns):
            if columns:
                column = batch.column(0)
                values = (
                    {only: value}
                    for value in column.cast(as_bytes.get(column.type, column.type)).to_pylist()
                )
            else:
                values = batch.to_pylist()
            for number, row in enumerate(values, number + 1):
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}
