"""Files of data: rows of .jsonl, .parquet and .csv; by name for a task, by pattern for --data."""

import codecs
import csv
import glob
import gzip
import json
import os
import zlib
from contextlib import contextmanager


def load_rows(name, split, hub_id, hub_config=None, check=None):
    """A data set's rows, as dicts with its own field names.

    They come from NANORL_DATA/<name>/<split>.jsonl, .parquet or .csv, else from the hub. check: is
    called with each row and raises ValueError for one that will not do. Raises ValueError that
    names such a row, and one that says both ways to get the rows where there are none.
    """
    path = data_file(name, split)
    if path:
        named = read_rows(path)
    else:
        rows = from_hub(name, split, hub_id, hub_config)
        named = ((f"{hub_id}, {split}, row {i}", row) for i, row in enumerate(rows))

    checked = []
    for row_name, row in named:
        try:
            if check:
                check(row)
        except ValueError as error:
            raise ValueError(f"{row_name}: {error}") from None
        checked.append(row)
    return checked


def data_file(name, split):
    """A data set's file in NANORL_DATA, or None where there is none."""
    root = os.path.expanduser(os.environ.get("NANORL_DATA", ""))
    for ending in READERS if root else ():
        path = os.path.join(root, name, split + ending)
        if os.path.exists(path):
            return path
    return None


def need_text(row, name):
    """A row's field of text. Raises ValueError where it is missing, empty or something else."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        shown = "missing" if name not in row else json.dumps(value, default=str)[:40]
        raise ValueError(f"{name!r} is {shown}: it must be a text, so mend the row or take it out")
    return value


def from_hub(name, split, hub_id, hub_config):
    """A data set's rows from the hub, for load_rows."""
    root = os.environ.get("NANORL_DATA")
    try:
        import datasets

        return list(datasets.load_dataset(hub_id, hub_config, split=split))
    except Exception as error:
        path = os.path.join(root or "$NANORL_DATA", name, split + ".jsonl")
        raise ValueError(
            f"data set {name!r}, split {split!r}, is not at hand: "
            f"put it at {path}, or connect to the hub "
            f"once so that `datasets` can fetch {hub_id} ({type(error).__name__})"
        ) from None


def find_files(patterns):
    """'a.txt, more/**/*.jsonl' -> paths, no file twice.

    The patterns come in turn, and the files of each are sorted. Raises ValueError for a pattern
    that finds no file.
    """
    files = []
    for pattern in split_at_commas(patterns):
        expanded = os.path.expanduser(pattern)
        if os.path.isfile(expanded):
            # It is taken as it is, whatever * or [ its name has.
            files.append(expanded)
            continue
        found = [path for path in glob.glob(expanded, recursive=True) if os.path.isfile(path)]
        if not found:
            remedy = "check the path (a * in it needs quotes)"
            if "," in patterns:
                remedy += "; commas separate, and ? stands for one in a name"
            if os.path.isdir(expanded):
                remedy = f"name its files, such as {os.path.join(pattern, '*.txt')}"
            raise ValueError(f"--data: {pattern!r} is no file and finds none: {remedy}")
        files += sorted(found)
    if not files:
        raise ValueError(f"--data={patterns!r} names no file")
    return list(dict.fromkeys(files))


def split_at_commas(patterns):
    """'a.txt, b*.txt' -> ['a.txt', 'b*.txt']. A comma in the name of a file that is there stays."""
    items = patterns.split(",")
    found = []
    while items:
        # The most items that are one file's name together, or just the next.
        taken = len(items)
        while taken > 1 and not os.path.isfile(os.path.expanduser(",".join(items[:taken]).strip())):
            taken -= 1
        pattern = ",".join(items[:taken]).strip()
        if pattern:
            found.append(pattern)
        items = items[taken:]
    return found


def kind(path):
    """'x/a.jsonl.gz' -> '.jsonl'"""
    return os.path.splitext(path.removesuffix(".gz"))[1].lower()


@contextmanager
def open_bytes(path):
    """A file to read bytes from; a .gz is unpacked.

    Raises ValueError where it cannot be read, be it at once or later.
    """
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
            yield f
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def decode(data, place, bad=None):
    """UTF-8 bytes -> str. place: where they stand, for messages: 'a.jsonl, line 3'.

    bad: a list that gets the places of bytes that are not UTF-8, which become U+FFFD. Without a
    list they raise ValueError.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if bad is None:
            raise ValueError(f"{place}: not UTF-8 ({error.reason}): convert the file") from None
        bad.append(place)
        return data.decode("utf-8", errors="replace")


# ---- rows ----------------------------------------------------------------------------------------


def read_rows(path, only=None, bad=None):
    """Yield (name, row) of a file of rows, a few at a time.

    The name is for messages, such as 'a.jsonl, line 3'. The row is a dict. only: the one field
    that is wanted; a parquet file's other fields are then not read, and its text comes as bytes.
    bad: as for decode.

    Raises ValueError for a file of another kind, one that cannot be read, and a broken row.
    """
    if kind(path) not in READERS:
        raise ValueError(f"{path} is not a file of rows: convert it to one of {', '.join(READERS)}")
    read = READERS[kind(path)]
    with open_bytes(path) as f:
        yield from read(f, path, only, bad)


def _lines(f, path, bad):
    """Yield (name, text) of every line."""
    for number, line in enumerate(f, 1):
        name = f"{path}, line {number}"
        yield name, decode(line.removeprefix(codecs.BOM_UTF8), name, bad)


def _read_jsonl(f, path, _only, bad):
    for name, line in _lines(f, path, bad):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)
            raise ValueError(f"{name}: not JSON ({reason})") from None
        if not isinstance(row, dict):
            raise ValueError(f'{name}: not an object: a row is written {{"field": value, ...}}')
        if bad is None:
            _check_surrogates(line, row, name)
        yield name, row


def _check_surrogates(line, row, name):
    """Raises ValueError for a row of JSON with half of a surrogate pair: UTF-8 cannot write it."""
    if "\\u" not in line:
        return  # no character is written as an escape
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start].encode("unicode_escape").decode()
        raise ValueError(
            f"{name}: it holds {half}, half of a character: write both halves, or take it out"
        ) from None


def _read_csv(f, path, _only, bad):
    csv.field_size_limit(2**31 - 1)  # the default refuses cells beyond 128 KB
    # strict: a quote that is never closed is an error. Otherwise it would take in all that follows.
    reader = csv.DictReader((line for _, line in _lines(f, path, bad)), strict=True)
    # A row may go over several lines. It is named after its last.
    try:
        header = reader.fieldnames or []
        if len(set(header)) < len(header):
            raise ValueError(f"{path}, line 1: two columns have one name: {', '.join(header)}")
        for row in reader:
            name = f"{path}, line {reader.line_num}"
            # DictReader puts None for a field that is missing, and under None those beyond.
            if None in row or None in row.values():
                raise ValueError(
                    f"{name}: it has not the {len(header)} fields that the header names: "
                    'put a text with commas or quotes in quotes, "a, ""b"""'
                )
            yield name, row
    except csv.Error as error:
        line = reader.reader.line_num
        raise ValueError(f"{path}, line {line}: not CSV ({error})") from None


def _read_parquet(f, path, only, _bad):
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(f)
        columns = [only] if only in file.schema_arrow.names else None
        for batch in file.iter_batches(256, columns=columns):
            if columns:
                rows = [{only: value} for value in _column_values(batch.column(0))]
            else:
                rows = batch.to_pylist()
            for row in rows:
                number += 1
                yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _column_values(column):
    """A pyarrow array -> list. Text comes as bytes, since it may not be UTF-8."""
    import pyarrow

    if column.type == pyarrow.string():
        column = column.cast(pyarrow.binary())
    elif column.type == pyarrow.large_string():
        column = column.cast(pyarrow.large_binary())
    return column.to_pylist()


READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}
