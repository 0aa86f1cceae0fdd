"""Text <-> token ids: byte-level BPE, trained by `tokenizers`, stored as tokenizer.json, run by tiktoken.

Chat is ChatML, spliced as ids: the special tokens are put in by number and every text is encoded as plain
text, so "<|im_end|>" inside a user's message stays six ordinary pieces and can never end a turn.

    <|im_start|>user\\nCalculate: 15 + 8 = <|im_end|>\\n<|im_start|>assistant\\n#23<|im_end|>\\n
    '-------------------- the prompt: what render_prompt gives ----------------'
                                                                     '--- loss ---'
"""
import json
import os
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

# Qwen's pattern: words with their leading space, single digits, runs of punctuation, line breaks, white space.
# Single digits measured best for arithmetic (docs/log.md): a number's length is visible and columns line up.
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
           r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# What tokenizers' ByteLevel(use_regex=True) applies when no Split comes before it.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

DOCUMENT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def read_json(file):
    """A JSON file. Raises ValueError that names it when it is damaged."""
    with open(file, encoding="utf-8") as f:
        try:
            return json.load(f)
        except ValueError as error:
            raise ValueError(f"{file} cannot be read ({error}): the file is damaged or cut short") from None


def _byte_of_char():
    """GPT-2's table: each byte is written as one printable character in tokenizer.json. Returns {char: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    rest = [b for b in range(256) if b not in printable]
    table.update({chr(256 + i): b for i, b in enumerate(rest)})
    return table


def _splitting_rule(spec):
    """tokenizer.json -> (regular expression, normaliser name or None). What is not byte-level BPE is refused by name."""
    if spec["model"]["type"] != "BPE":
        raise ValueError(f"tokenizer model {spec['model']['type']!r} is not supported: nanorl reads byte-level BPE")
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(f"tokenizer normaliser {normalizer!r} is not supported: nanorl knows NFC or none")
    pre = spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space"):
        return GPT2_PATTERN, normalizer
    if kinds == ["Split", "ByteLevel"] and "Regex" in steps[0]["pattern"] and not steps[1].get("use_regex"):
        return steps[0]["pattern"]["Regex"], normalizer
    raise ValueError(f"pre-tokenizer {kinds} is not supported: nanorl knows ByteLevel, and Split followed by ByteLevel")


class Tokenizer:
    """Byte-level BPE with ChatML. `spec` is the parsed tokenizer.json, which is all of its state."""

    def __init__(self, spec):
        self.spec = spec
        pattern, self.normalizer = _splitting_rule(spec)
        byte_of = _byte_of_char()
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        # Added tokens that are not marked special, such as Qwen3's <think>, are words of the text.
        self.words = {token["content"] for token in spec["added_tokens"] if not token["special"]} - {DOCUMENT_END, TURN_START, TURN_END}
        ranks = {bytes(byte_of[c] for c in token): id for token, id in spec["model"]["vocab"].items() if token not in self.special}
        merges = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
        order = [spec["model"]["vocab"][a + b] for a, b in merges]
        if order != sorted(order):  # tiktoken merges by id, so ids must follow the order of the merges
            raise ValueError("this tokenizer's ids do not follow its merges, so tiktoken cannot run it")
        self.encoding = tiktoken.Encoding("nanorl", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special)
        self.n_tokens = 1 + max(*ranks.values(), *self.special.values())  # ids are 0 .. n_tokens - 1
        missing = [name for name in (TURN_START, TURN_END) if name not in self.special]
        if missing:
            raise ValueError(f"the tokenizer has no {' and no '.join(missing)}: nanorl's chat format is ChatML")
        self.turn_start, self.turn_end = self.special[TURN_START], self.special[TURN_END]
        self.document_end = self.special.get(DOCUMENT_END, self.turn_end)  # the boundary token between documents
        self.stop_ids = sorted({self.turn_end, self.document_end})  # a completion ends with one of these

    @classmethod
    def train(cls, texts, vocab_size, pattern=PATTERN):
        """Train byte-level BPE on an iterator of strings. The result may have fewer than `vocab_size` tokens
        when the text has no more pairs to merge."""
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[DOCUMENT_END, TURN_START, TURN_END], show_progress=False)
        bpe.train_from_iterator(texts, trainer)
        return cls(json.loads(bpe.to_str()))

    @classmethod
    def from_pretrained(cls, path):
        """Read `path`/tokenizer.json."""
        file = os.path.join(path, "tokenizer.json")
        if not os.path.exists(file):
            raise ValueError(f"no tokenizer.json in {path!r}")
        return cls(read_json(file))

    def save(self, path):
        """Write tokenizer.json and what transformers needs beside it. `tokenizer_class` is stated, because for
        some model types AutoTokenizer would otherwise pick another tokenizer and give other ids."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": TURN_END, "clean_up_tokenization_spaces": False}
        if DOCUMENT_END in self.special:
            config["pad_token"] = DOCUMENT_END
        for name, text in [("tokenizer.json", json.dumps(self.spec, ensure_ascii=False)),
                           ("tokenizer_config.json", json.dumps(config, indent=2)), ("chat_template.jinja", CHAT_TEMPLATE)]:
            with open(os.path.join(path, name), "w", encoding="utf-8") as f:
                f.write(text)

    def encode(self, text):
        """str -> list of ids. The spelling of a special token is ordinary text."""
        if self.normalizer == "NFC":
            text = unicodedata.normalize("NFC", text)
        return self.encoding.encode(text, allowed_special=self.words, disallowed_special=())

    def encode_many(self, texts):
        """encode() of each, in a thread per core: tiktoken works outside of Python's lock."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids):
        """ids -> str. Bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode_bytes([i for i in ids if 0 <= i < self.n_tokens]).decode("utf-8", errors="replace")

    def render_prompt(self, messages):
        """Chat messages -> ids that end where the assistant starts to write."""
        return self._turns(messages)[0] + [self.turn_start] + self.encode("assistant\n")

    def render_chat(self, messages):
        """Chat messages -> (ids, mask) of equal length; mask is 1 on what the assistant must learn to produce:
        its words and the token that ends its turn."""
        return self._turns(messages)

    def _turns(self, messages):
        ids, mask = [], []
        for message in messages:
            if message["role"] == "assistant":
                # Encoded apart from the header, so that training sees the very ids that sampling continues from.
                head, said = [self.turn_start] + self.encode("assistant\n"), self.encode(message["content"]) + [self.turn_end]
            else:
                head, said = [self.turn_start] + self.encode(f"{message['role']}\n{message['content']}") + [self.turn_end], []
            tail = self.encode("\n")
            ids += head + said + tail
            mask += [0] * len(head) + [1] * len(said) + [0] * len(tail)
        return ids, mask
