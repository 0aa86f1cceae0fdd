"""Data sets that --data names, hf:<name> -> documents or rows, read as they are fetched."""

import os
from itertools import islice

from nanorl.data.corpus import (
    MAX_BYTES,
    SAMPLE_BYTES,
    VAL_ONE_IN,
    cut,
    look_through,
    text_of_row,
)
from nanorl.tasks.files import decode
from nanorl.tasks.problem import content_hash

PREFIX = "hf:"
# The survey reads so much text. One in VAL_ONE_IN of its documents validates, about 2 MB.
SURVEY_BYTES = 100_000_000


def is_stream(names):
    """Whether --data names a data set and not files."""
    return any(item.strip().startswith(PREFIX) for item in names.split(","))


def parse_name(item):
    """'hf:owner/name:config:split' -> (owner/name, config or None, split).

    The last two may be missing. A folder's path may take the name's part. Raises ValueError for
    something else.
    """
    name, *rest = item.strip().removeprefix(PREFIX).split(":")
    if not item.strip().startswith(PREFIX) or not name or len(rest) > 2:
        raise ValueError(
            f"--data: {item.strip()!r} is no hf:<name>, hf:<name>:<config> or "
            "hf:<name>:<config>:<split>; data sets and files cannot be named together"
        )
    config, split = [*rest, "", ""][:2]
    name = os.path.expanduser(name)
    if name.startswith((os.sep, ".")) and not os.path.isdir(name):
        raise ValueError(f"--data: {name} is no folder: check the path")
    return name, config or None, split or "train"


class Stream:
    """The documents of data sets on the Hugging Face hub, or of folders of files, in turn.

    It is a source for tokens.tokenize. No data set is fetched before it is read, nor kept. Several
    take turns, a document each, until all have run out. Texts that are empty are left out.

    text_field: None for first_rows, which gives all of a row.
    made_from: what the documents depend on; for a folder its files, for the hub the names.
    Position: where documents() goes on, [state of the `datasets` stream before a row, how many
    pieces of the row are done].
    """

    def __init__(self, names, text_field="text"):
        self.names = names
        self.parts = [parse_name(item) for item in names.split(",")]
        self.text_field = text_field
        self.position = None
        self.made_from = {
            "data sets": [list(part) for part in self.parts],
            "files": [_files_in(name) for name, _, _ in self.parts],
            "text_field": text_field,
            "rules": [VAL_ONE_IN, MAX_BYTES, SAMPLE_BYTES, SURVEY_BYTES],
        }

    def survey(self):
        """Read the first SURVEY_BYTES -> (texts to train the tokenizer on, facts).

        Of these documents one in VAL_ONE_IN validates. facts["val"] are their hashes, so that a
        copy of one that comes later validates too. facts["revisions"]: the commit of each data set,
        with which a start after a kill goes on.
        """
        revisions = [self._try(_revision, name) for name, _, _ in self.parts]
        low_hashes = set()
        texts, _, bound = look_through(self._first_texts(revisions, low_hashes), self.names)
        facts = {
            "name": self.names,
            "revisions": revisions,
            # Where no hash is so low, the least one is bound - 1.
            "val": sorted(low_hashes) or [bound - 1],
            "notes": [],
        }
        return texts, facts

    def _first_texts(self, revisions, low_hashes):
        """Yield the survey's texts; the set `low_hashes` gets the hashes of those that validate."""
        size = 0
        for text in self._texts(revisions, None):
            text_hash = content_hash(text)
            if text_hash < 2**63 // VAL_ONE_IN:
                low_hashes.add(text_hash)
            yield text
            size += len(text.encode())
            if size >= SURVEY_BYTES:
                return

    def documents(self, facts, position=None):
        """Yield (split, text) of every document, or of those after a position."""
        validating = set(facts["val"])
        for text in self._texts(facts["revisions"], position):
            yield "val" if content_hash(text) in validating else "train", text

    def first_texts(self):
        """Yield (text, None), and at the end ("", 1.0): how much there is nobody says before."""
        revisions = [self._try(_revision, name) for name, _, _ in self.parts]
        for text in self._texts(revisions, None):
            yield text, None
        yield "", 1.0

    def first_rows(self, most):
        """Yield (name for messages, row) of one data set's first rows, at most so many."""
        if len(self.parts) > 1:
            raise ValueError(
                f"--data={self.names}: of several data sets each needs a weight, such as "
                f"{self.names.split(',')[0].strip()}=1"
            )
        name = self.parts[0][0]
        stream = self._try(self._open, [self._try(_revision, name)])
        for number, row in enumerate(islice(self._rows(stream), most), 1):
            yield f"{name}, row {number}", row

    def _texts(self, revisions, position):
        """Yield the documents (str) after a position, and keep self.position at the last one."""
        stream = self._try(self._open, revisions)
        state, done = position or (None, 0)
        if state:
            stream.load_state_dict(state)
        for row in self._rows(stream):
            text = text_of_row(row, self.text_field, self.names)
            for number, piece in enumerate(cut(text), 1):
                piece_text = decode(piece, self.names, [])
                if number > done and piece_text.strip():
                    self.position = [state, number]
                    yield piece_text
            state, done = stream.state_dict(), 0

    def _open(self, revisions):
        """The rows of all data sets, as one stream of `datasets`."""
        import datasets

        streams = []
        for (name, config, split), revision in zip(self.parts, revisions):
            stream = datasets.load_dataset(
                name, config, split=split, revision=revision, streaming=True
            )
            streams.append(stream)
        if len(streams) == 1:
            return streams[0]
        # Other columns may differ in kind from one data set to the next.
        streams = [stream.select_columns([self.text_field]) for stream in streams]
        return datasets.interleave_datasets(
            streams, stopping_strategy="all_exhausted_without_replacement"
        )

    def _rows(self, stream):
        """Yield the rows of a stream. Raises ValueError where it breaks off."""
        rows = iter(stream)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                kept = "; what is tokenized already is kept" if self.text_field else ""
                raise ValueError(
                    f"--data={self.names}: reading broke off ({_in_a_line(error)}): if the network "
                    f"failed, start the same command again{kept}"
                ) from None
            yield row

    def _try(self, action, *arguments):
        """action(*arguments). Raises ValueError with both ways to the data where it fails."""
        try:
            return action(*arguments)
        except ImportError:
            raise ValueError(
                f"--data={self.names} needs the package datasets: pip install datasets; "
                "or give files, --data='folder/*.parquet'"
            ) from None
        except Exception as error:
            name = self.parts[0][0]
            problem = f"--data={self.names} is not to be had ({_in_a_line(error)})"
            if os.path.isdir(name):
                field = " and --text_field" if self.text_field else ""
                raise ValueError(
                    f"{problem}: check the folder's files, the config, the split{field}"
                ) from None
            raise ValueError(
                f"{problem}: connect to the hub and check the name (hf auth login, if it is "
                f"gated); or elsewhere hf download --repo-type=dataset {name} --local-dir=folder, "
                "bring the folder, and give --data=hf:folder"
            ) from None


def _revision(name):
    """The newest commit of a data set on the hub, or None for a folder."""
    if os.path.isdir(name):
        return None
    import huggingface_hub

    return huggingface_hub.HfApi().dataset_info(name).sha


def _files_in(folder):
    """[path, bytes, time] of every file in a folder, or [] where there is none."""
    found = []
    for path, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            stat = os.stat(os.path.join(path, name))
            found.append([os.path.join(path, name), stat.st_size, stat.st_mtime_ns])
    return found


def _in_a_line(error):
    """An error's kind and the beginning of what it says."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]}"
