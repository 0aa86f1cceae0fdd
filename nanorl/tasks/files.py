"""Data sets by name: files under NANORL_DATA first, then the hub through `datasets`."""
import csv
import json
import os


def load_rows(name, split, hub_id, hub_config=None):
    """Rows (dicts with the data set's own field names) of NANORL_DATA/<name>/<split>.jsonl, .parquet or .csv,
    else of the hub's data set. Raises ValueError that says both ways to get it."""
    root = os.environ.get("NANORL_DATA")
    for ending, read in [(".jsonl", _read_jsonl), (".parquet", _read_parquet), (".csv", _read_csv)] if root else []:
        path = os.path.join(root, name, split + ending)
        if os.path.exists(path):
            return read(path)
    try:
        import datasets
        return list(datasets.load_dataset(hub_id, hub_config, split=split))
    except Exception as error:
        where = os.path.join(root or "$NANORL_DATA", name, split + ".jsonl")
        raise ValueError(f"data set {name!r}, split {split!r}, is not at hand: put it at {where}, or connect to the hub "
                         f"once so that `datasets` can fetch {hub_id} ({type(error).__name__})") from None


def _read_jsonl(path):
    rows = []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
    return rows


def _read_parquet(path):
    import pyarrow.parquet
    return pyarrow.parquet.read_table(path).to_pylist()


def _read_csv(path):
    with open(path, encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))
