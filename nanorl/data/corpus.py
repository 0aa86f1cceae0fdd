"""Files that --data names -> documents for pretraining, some of them held out by their content."""

import codecs
import heapq
import json
import os

from tqdm import tqdm

from nanorl.tasks.files import READERS, decode, find_files, kind, open_bytes, read_rows
from nanorl.tasks.problem import content_hash

VAL_ONE_IN = 50  # documents or conversations of which one validates
MIN_BYTES = 8192  # from here on a blank line ends a document of plain text
# A longer document is cut. One long line then costs neither much memory nor much of the
# tokenizer's time.
MAX_BYTES = 65536
SAMPLE_BYTES = 16_000_000  # of text, at most, to train the tokenizer on
END = b"<|endoftext|>"  # alone on a line of plain text: the end of a document


def val_bound(least_hash):
    """Texts validate whose content_hash is below this: one in VAL_ONE_IN, and at least one text.

    least_hash: the least one of all the texts. A text that occurs twice is on one side only,
    because both times it has the same hash.
    """
    return max(2**63 // VAL_ONE_IN, least_hash + 1)


# ---- documents -----------------------------------------------------------------------------------


def cut(data):
    """Yield bytes in pieces of at most MAX_BYTES that end at white space or between characters."""
    start = 0
    while len(data) - start > MAX_BYTES:
        end = _end_of_piece(data, start)
        yield data[start:end]
        start = end
    yield data[start:]


def _end_of_piece(data, start):
    """The end of the piece that starts at `start`, where more than MAX_BYTES follow."""
    limit = start + MAX_BYTES
    # It ends after its last white space, if it has any.
    space = max(data.rfind(b" ", start, limit), data.rfind(b"\n", start, limit))
    if space >= 0:
        return space + 1
    # Otherwise the next piece begins with a character's first byte. A character of UTF-8 has at
    # most four bytes, and all but its first are 10xxxxxx.
    for end in range(limit, limit - 4, -1):
        if data[end] & 0xC0 != 0x80:
            return end
    return limit  # this is not UTF-8


def word_bounded(text, longest=1024):
    """A text -> [text], or its slices of `longest` characters if a word in it is longer than that.

    The time to train BPE grows with the square of a word's length.
    """
    if max(map(len, text.split())) <= longest:
        return [text]
    return [text[i : i + longest] for i in range(0, len(text), longest)]


def plain_documents(path):
    """Yield the documents (bytes) of a file of plain text.

    A line that holds <|endoftext|> alone ends a document. In a file without such a line, the first
    blank line after MIN_BYTES does. Long documents are cut. A line may be of any length. Raises
    ValueError for a file that is not text.
    """
    with open_bytes(path) as f:
        if b"\0" in f.peek(1024)[:1024]:
            raise ValueError(
                f"{path} is not UTF-8 text (it holds zero bytes): "
                "convert it to .txt, .jsonl, .parquet or .csv"
            )
        has_end_lines = any(line.strip() == END for line in _lines(f))
        f.seek(0)
        document, size = [], 0  # the lines so far, and their bytes
        for line in _lines(f):
            stripped = line.strip()
            if has_end_lines:
                ends = stripped == END
            else:
                ends = not stripped and size >= MIN_BYTES
            if ends:
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


def _lines(f):
    """Yield the lines of a file, one longer than MAX_BYTES in parts.

    A byte-order mark before a line is no part of it: files that were joined have some inside.
    """
    while line := f.readline(MAX_BYTES):
        yield line.removeprefix(codecs.BOM_UTF8)


def row_documents(path, field, not_utf8):
    """Yield the documents (bytes) of a file of rows: the text under `field`. Long ones are cut.

    The list `not_utf8` gets the names of rows with bytes that are not UTF-8 (files.decode). Raises
    ValueError for a row that has no such field or no text in it.
    """
    for row_name, row in read_rows(path, only=field, bad=not_utf8):
        yield from cut(text_of_row(row, field, row_name))


def text_of_row(row, field, row_name):
    """The text (bytes) of a row; that of None is empty.

    Raises ValueError where the row has no such field or something else in it.
    """
    if field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise ValueError(
            f"{row_name}: no field {field!r}, only {fields}: "
            "name the one with the text, --text_field="
        )
    text = row[field]
    if text is None:
        text = b""
    if isinstance(text, str):
        # JSON may hold half of a surrogate pair. Its bytes are not UTF-8, as decode() finds.
        text = text.encode("utf-8", "surrogatepass")
    if not isinstance(text, bytes):
        shown = json.dumps(text, default=str)[:40]
        raise ValueError(
            f"{row_name}: {field!r} is {shown}, not text: "
            "name the field with the text, --text_field="
        )
    return text


# ---- the corpus ----------------------------------------------------------------------------------


class Corpus:
    """The documents of the files that `patterns` find (files.find_files).

    It is a source for tokens.tokenize. made_from: the files and rules that the documents depend on.
    """

    def __init__(self, patterns, text_field="text"):
        self.files = find_files(patterns)
        self.text_field = text_field
        versions = []
        for path in self.files:
            stat = os.stat(path)
            versions.append([path, stat.st_size, stat.st_mtime_ns])
        self.made_from = {
            "files": versions,
            "text_field": text_field,
            "rules": [VAL_ONE_IN, MIN_BYTES, MAX_BYTES, SAMPLE_BYTES],
        }

    def survey(self):
        """Read everything once -> (texts to train the tokenizer on, facts for documents()).

        Raises ValueError where there are not two different documents.
        """
        not_utf8, empty = [], []
        plural = "s" if len(self.files) > 1 else ""
        name = f"{len(self.files)} file{plural}"
        texts, nbytes, bound = look_through(self._texts(not_utf8, empty), name)
        facts = {
            "name": name,
            "bytes": nbytes,
            "val_bound": bound,
            "notes": _notes(not_utf8, empty),
        }
        return texts, facts

    def documents(self, facts):
        """Yield (split, text) of every document. facts: the survey's."""
        for text in self._texts([], []):
            validates = content_hash(text) < facts["val_bound"]
            yield "val" if validates else "train", text

    def _texts(self, not_utf8, empty):
        """Yield the documents (str) but for the empty ones.

        The list `not_utf8` gets the file or row of each that was not UTF-8, and `empty` the file of
        each that is left out.
        """
        for path in self.files:
            yield from self._texts_of(path, not_utf8, empty)

    def _texts_of(self, path, not_utf8, empty):
        if kind(path) in READERS:
            documents = row_documents(path, self.text_field, not_utf8)
        else:
            documents = plain_documents(path)
        for data in documents:
            text = decode(data, path, not_utf8)
            if text.strip():
                yield text
            else:
                empty.append(path)

    def first_texts(self):
        """Yield (text, None), and after each file ("", share of all files' bytes read so far)."""
        sizes = [max(1, os.path.getsize(path)) for path in self.files]
        done = 0
        for path, nbytes in zip(self.files, sizes):
            for text in self._texts_of(path, [], []):
                yield text, None
            done += nbytes
            yield "", done / sum(sizes)


def look_through(texts, name):
    """Read texts -> (those to train the tokenizer on, bytes of all, the bound of val_bound()).

    Those are the ones of the greatest hashes, so they are spread over all texts and always the
    same, and none of them validates. name: of the texts, for messages. Raises ValueError where
    there are not two different texts.
    """
    nbytes = 0
    least_hash = 2**63
    sample = Sample()
    with tqdm(desc="reading", unit="B", unit_scale=True, disable=None) as bar:
        for text in texts:
            text_hash = content_hash(text)
            text_bytes = len(text.encode())
            nbytes += text_bytes
            least_hash = min(least_hash, text_hash)
            sample.add(text_hash, text_bytes, text)
            bar.update(text_bytes)

    bound = val_bound(least_hash)
    sampled = []
    for text_hash, _, text in sorted(sample.heap):
        if text_hash >= bound:
            sampled += word_bounded(text)
    if not sampled:
        raise ValueError(
            f"--data: {len(sample.heap)} different documents in {name}: there must be two or "
            "more, one of which validates: give more text, or end documents with a line "
            f"{END.decode()}"
        )
    # The words of chat headers are to be tokens too, where the vocabulary has room for them.
    sampled += ["system\nuser\nassistant\n"] * 500
    return sampled, nbytes, bound


class Sample:
    """The texts of the greatest hashes, each once, with at most SAMPLE_BYTES in all."""

    def __init__(self):
        self.heap = []  # (hash, bytes, text), the least hash first
        self.hashes = set()
        self.size = 0  # bytes of all the texts

    def add(self, text_hash, nbytes, text):
        if text_hash in self.hashes:
            return
        self.hashes.add(text_hash)
        heapq.heappush(self.heap, (text_hash, nbytes, text))
        self.size += nbytes
        while self.size > SAMPLE_BYTES:
            least_hash, its_bytes, _ = heapq.heappop(self.heap)
            self.hashes.remove(least_hash)
            self.size -= its_bytes


def _notes(not_utf8, empty):
    """What the user is told of documents that were mended or left out."""
    notes = []
    if not_utf8:
        notes.append(
            f"{len(not_utf8):,} documents held bytes that are not UTF-8; "
            f"they became U+FFFD (first: {not_utf8[0]})"
        )
    if empty:
        notes.append(f"{len(empty):,} empty documents were left out (first: {empty[0]})")
    return notes
