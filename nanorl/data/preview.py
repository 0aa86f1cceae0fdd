"""What tokenizing text would give, found in memory from its beginning, with nothing written."""

import math
from dataclasses import dataclass

from nanorl.data.corpus import VAL_ONE_IN, word_bounded
from nanorl.data.stream import Stream
from nanorl.data.tokens import SHARD_BYTES, SPLITS, read_index, total
from nanorl.tasks.cores import cpus
from nanorl.tokenizer import Tokenizer

ENOUGH = 8_000_000  # bytes of text: with so many, and a share known, there is no need of more
MOST = 300_000_000  # bytes of text that are read at most, where the first file does not end


@dataclass
class Preview:
    """vocabulary: ids of the tokenizer.
    bytes_a_token: of text.
    train, val: tokens of the splits; None where nobody knows how much text there is.
    exact: whether they are counted, and not estimated.
    how: where all this is from, in words.
    """

    vocabulary: int
    bytes_a_token: float
    train: int
    val: int
    exact: bool
    how: str

    def made(self, enough):
        """(train, val) tokens of the token files that tokenize makes of it; see there."""
        if not enough or "token files" in self.how:
            return self.train, self.val
        a_shard = SHARD_BYTES / self.bytes_a_token
        train = math.ceil(math.ceil(enough / a_shard) * a_shard)
        if self.train is None:
            return train, train // VAL_ONE_IN
        train = min(train, self.train)
        return train, round(self.val * train / max(1, self.train))

    def in_words(self):
        about = "" if self.exact else "about "
        tokens = "how many tokens there are is not known without reading all of it"
        if self.train is not None:
            tokens = f"{about}{self.train:,} tokens to train on and {self.val:,} to validate"
        return f"{tokens}, {about}{self.bytes_a_token:.2f} bytes a token ({self.how})"


def preview(source, vocab_size, directory):
    """A source of tokens.tokenize -> Preview. directory: where its token files are or will be.

    Raises ValueError where the text cannot be read, as tokenize would.
    """
    index = read_index(directory)
    if index.get("whole") and index["made_from"] == {**source.made_from, "vocab_size": vocab_size}:
        return of_index(index, directory)

    texts, nbytes, share = read_first(source)
    if share == 1.0 and nbytes <= ENOUGH:
        return of_everything(source, vocab_size)
    return of_first(texts, nbytes, share, vocab_size)


def of_index(index, directory):
    """Of token files that are there."""
    counts = {split: total(index, "tokens", [split]) for split in SPLITS}
    tokens = sum(counts.values())
    vocabulary = Tokenizer.from_pretrained(directory).n_tokens
    bytes_a_token = total(index, "bytes") / max(1, tokens)
    how = f"the token files in {directory}"
    return Preview(vocabulary, bytes_a_token, **counts, exact=True, how=how)


def read_first(source):
    """-> (the first ENOUGH of the texts; bytes read; what share of all text that is, or None)."""
    texts, nbytes = [], 0
    for text, share in source.first_texts():
        if nbytes < ENOUGH and text:
            texts.append(text)
        nbytes += len(text.encode())
        if share == 1.0 or (share and nbytes >= ENOUGH):
            return texts, nbytes, share
        # How much a data set on the hub has is only known at its end.
        if nbytes >= (ENOUGH if isinstance(source, Stream) else MOST):
            break
    return texts, nbytes, None


def of_everything(source, vocab_size):
    """Do as tokenize does, and count."""
    texts, facts = source.survey()
    tokenizer = Tokenizer.train(texts, vocab_size)
    documents = list(source.documents(facts))
    encoded = tokenizer.encode_many([text for _, text in documents], cpus())
    counts = dict.fromkeys(SPLITS, 0)
    for (split, _), ids in zip(documents, encoded):
        counts[split] += len(ids) + 1  # a boundary follows each
    nbytes = sum(len(text.encode()) for _, text in documents)
    bytes_a_token = nbytes / max(1, sum(counts.values()))
    how = "all of the text, tokenized in memory"
    return Preview(tokenizer.n_tokens, bytes_a_token, **counts, exact=True, how=how)


def of_first(texts, nbytes, share, vocab_size):
    """Estimate from the first texts."""
    words = []
    for text in texts:
        words += word_bounded(text)
    tokenizer = Tokenizer.train(words, vocab_size)
    tokens = sum(len(ids) + 1 for ids in tokenizer.encode_many(texts, cpus()))
    seen = sum(len(text.encode()) for text in texts)
    bytes_a_token = seen / tokens

    train = val = None
    if share:
        everything = nbytes / share / bytes_a_token
        val = round(everything / VAL_ONE_IN)
        train = round(everything) - val
    how = f"estimated with a tokenizer of the first {megabytes(seen)} of text"
    # The run's own tokenizer sees more text, so that it does not run out of words.
    return Preview(vocab_size, bytes_a_token, train, val, exact=False, how=how)


def megabytes(n):
    return f"{n / 1e6:,.1f} MB"
