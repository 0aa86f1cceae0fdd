"""Files that --data names -> documents for pretraining, some of them held out, by their content."""

import heapq
import json
import os

from tqdm import tqdm

from nanorl.tasks.files import READERS, decode, find_files, kind, open_bytes, read_rows
from nanorl.tasks.problem import content_hash

VAL_ONE_IN = 50  # documents or conversations of which one validates
MIN_BYTES = 8192  # from here on a blank line ends a document of plain text
MAX_BYTES = 65536  # a longer document is cut, so that neither memory nor the tokenizer's time grows with one long line
SAMPLE_BYTES = 16_000_000  # of text, at most, to train the tokenizer on
END = b"<|endoftext|>"  # alone on a line of plain text: the end of a document


def val_bound(least_hash):
    """Texts whose content_hash is below this validate: one in VAL_ONE_IN, and at least the one with the least hash. A text that
    occurs twice is therefore never on both sides."""
    return max(2**63 // VAL_ONE_IN, least_hash + 1)


# ---- documents -----------------------------------------------------------------------------------------------


def cut(data):
    """Yield bytes in pieces of at most MAX_BYTES: up to the last white space or, where there is none, between two characters."""
    start = 0
    while len(data) - start > MAX_BYTES:
        end = start + MAX_BYTES
        at = 1 + max(data.rfind(b" ", start, end), data.rfind(b"\n", start, end))
        at = at or next(
            (i for i in range(end, end - 4, -1) if data[i] & 0xC0 != 0x80), end
        )  # never before a continuation byte
        yield data[start:at]
        start = at
    yield data[start:]


def word_bounded(text, longest=1024):
    """The text, in slices where a word in it is longer than this many characters: training BPE takes time with a word's square."""
    return (
        [text]
        if max(map(len, text.split())) <= longest
        else [text[i : i + longest] for i in range(0, len(text), longest)]
    )


def plain_documents(path):
    """Yield the documents (bytes) of a plain text: what stands between lines of <|endoftext|> alone; in a file without such a
    line, what stands up to the first blank line after MIN_BYTES. Long ones are cut; a line may be of any length."""
    with open_bytes(path) as f:
        if b"\0" in f.peek(1024)[:1024]:
            raise ValueError(
                f"{path} is not UTF-8 text (it holds zero bytes): convert it to .txt, .jsonl, .parquet or .csv"
            )
        lines = lambda: iter(lambda: f.readline(MAX_BYTES), b"")
        marked = any(line.strip() == END for line in lines())
        f.seek(0)
        document, size = [], 0
        for line in lines():
            if line.strip() == END if marked else size >= MIN_BYTES and not line.strip():
                yield b"".join(document).strip(b"\r\n")
                document, size = [], 0
                continue
            document.append(line)
            size += len(line)
            if size > MAX_BYTES:
                *whole, rest = cut(b"".join(document))
                yield from whole
                document, size = [rest], len(rest)
        if size:
            yield b"".join(document).strip(b"\r\n")


def row_documents(path, field, bad):
    """Yield the documents (bytes) of a file of rows: their text fields. Long ones are cut. bad: see files.decode."""
    for place, row in read_rows(path, only=field, bad=bad):
        if field not in row:
            raise ValueError(
                f"{place}: no field {field!r}, only {', '.join(map(str, row)) or 'none'}: name the one with the text, --text_field="
            )
        text = b"" if row[field] is None else row[field]
        if not isinstance(text, (str, bytes)):
            raise ValueError(
                f"{place}: {field!r} is {json.dumps(text, default=str)[:40]}, not text: name the field with the text, --text_field="
            )
        yield from cut(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)


class Corpus:
    """The documents of the files that `patterns` find (files.find_files). made_from: files and rules that they depend on."""

    def __init__(self, patterns, text_field="text"):
        self.files, self.text_field = find_files(patterns), text_field
        stats = [os.stat(path) for path in self.files]
        self.made_from = {
            "files": [[path, s.st_size, s.st_mtime_ns] for path, s in zip(self.files, stats)],
            "text_field": text_field,
            "rules": [VAL_ONE_IN, MIN_BYTES, MAX_BYTES, SAMPLE_BYTES],
        }

    def _texts(self, bad, empty):
        """Yield the documents (str), all but the empty ones. `bad` gets the place of each that was not UTF-8, `empty` of each left out."""
        for path in self.files:
            for data in (
                row_documents(path, self.text_field, bad)
                if kind(path) in READERS
                else plain_documents(path)
            ):
                text = decode(data, path, bad)
                if text.strip():
                    yield text
                else:
                    empty.append(path)

    def survey(self):
        """Read everything once -> (texts to train the tokenizer on, what documents() has to know). The texts are the documents of
        the greatest hashes: spread over the corpus, always the same, and none that validates."""
        bad, empty, total, least = [], [], 0, 2**63
        sample, hashes, size = [], set(), 0  # a heap, the least hash first
        with tqdm(desc="reading", unit="B", unit_scale=True, disable=None) as bar:
            for text in self._texts(bad, empty):
                h, nbytes = content_hash(text), len(text.encode())
                total, least = total + nbytes, min(least, h)
                bar.update(nbytes)
                if h not in hashes:
                    hashes.add(h)
                    heapq.heappush(sample, (h, nbytes, text))
                    size += nbytes
                while size > SAMPLE_BYTES:
                    h, nbytes, _ = heapq.heappop(sample)
                    hashes.remove(h)
                    size -= nbytes
        name, bound = f"{len(self.files)} file{'s' * (len(self.files) > 1)}", val_bound(least)
        texts = [part for h, _, text in sorted(sample) if h >= bound for part in word_bounded(text)]
        if not texts:
            raise ValueError(
                f"--data: {len(sample)} different documents in {name}: there must be two or more, one of which validates: give more text, "
                f"or end documents with a line {END.decode()}"
            )
        notes = (
            [
                f"{len(bad):,} documents held bytes that are not UTF-8; they became U+FFFD (first: {bad[0]})"
            ]
            if bad
            else []
        )
        notes += (
            [f"{len(empty):,} empty documents were left out (first: {empty[0]})"] if empty else []
        )
        # The words of chat headers are to be tokens too, where the vocabulary has room for them.
        return texts + ["system\nuser\nassistant\n"] * 500, {
            "name": name,
            "bytes": total,
            "val_bound": bound,
            "notes": notes,
        }

    def documents(self, facts):
        """Yield (split, text)."""
        for text in self._texts([], []):
            yield "val" if content_hash(text) < facts["val_bound"] else "train", text
