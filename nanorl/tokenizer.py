"""Text <-> token ids: byte-level BPE, trained by `tokenizers` or published with a model, stored as tokenizer.json, run by tiktoken.

A chat is spliced as ids: the special tokens are put in by number and every text is encoded as plain text, so "<|im_end|>" inside a
user's message stays six ordinary pieces and can never end a turn.

    <|im_start|>user\\nCalculate: 15 + 8 = <|im_end|>\\n<|im_start|>assistant\\n#23<|im_end|>\\n
    '-------------------- the prompt: what render_prompt gives ----------------'
                                                                     '--- loss ---'
"""

import json
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from nanorl.chat import CHATML, read_template, style_of

# Qwen's pattern: words with their leading space, single digits, runs of punctuation, line breaks, white space.
# Single digits measured best for arithmetic (docs/log.md): a number's length is visible and columns line up.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What tokenizers' ByteLevel(use_regex=True) applies, GPT-2's, and the same after Digits has cut the text before and after each digit (or run
# of digits), so that no piece and no look ahead reaches over one.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)

DOCUMENT_END = "<|endoftext|>"  # ends a text in pretraining; Llama-3 calls it <|end_of_text|>


def read_json(file):
    """A JSON file. Raises ValueError that names it when it is damaged."""
    with open(file, encoding="utf-8") as f:
        try:
            return json.load(f)
        except ValueError as error:
            raise ValueError(
                f"{file} cannot be read ({error}): the file is damaged or cut short"
            ) from None


def _byte_of_char():
    """GPT-2's table: each byte is written as one printable character in tokenizer.json. Returns {char: byte}."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in printable}
    rest = [b for b in range(256) if b not in printable]
    table.update({chr(256 + i): b for i, b in enumerate(rest)})
    return table


def _splitting_rule(spec):
    """tokenizer.json -> (regular expression, normaliser name or None). What is not byte-level BPE is refused by name."""
    model = spec["model"]
    if model["type"] != "BPE":
        raise ValueError(
            f"tokenizer model {model['type']!r} is not supported: nanorl reads byte-level BPE"
        )
    if model.get("byte_fallback"):
        raise ValueError(
            "a SentencePiece-style tokenizer (BPE with byte_fallback) is not supported: nanorl reads byte-level BPE"
        )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"tokenizer with {name}={model[name]!r} is not supported")
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(
            f"tokenizer normaliser {normalizer!r} is not supported: nanorl knows NFC or none"
        )
    pre = spec.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    if kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        own_pattern = steps[-1].get("use_regex", True)
        if kinds == ["ByteLevel"] and own_pattern:
            return GPT2_PATTERN, normalizer
        if kinds == ["Digits", "ByteLevel"] and own_pattern:
            return DIGITS_PATTERN % ("" if steps[0]["individual_digits"] else "+"), normalizer
        if (
            kinds == ["Split", "ByteLevel"]
            and not own_pattern
            and "Regex" in steps[0]["pattern"]
            and (steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False)
        ):
            return steps[0]["pattern"]["Regex"], normalizer
    raise ValueError(
        f"pre-tokenizer {kinds} is not supported: nanorl knows ByteLevel, alone or after Digits or Split"
    )


class Tokenizer:
    """Byte-level BPE with a chat format. `spec` is the parsed tokenizer.json; chat_template a Jinja template (None: the plain one of the
    style whose tokens there are); bos and eos, tokens that a template may name; stop_ids, ids that end a completion besides the
    turn's and the document's end."""

    def __init__(self, spec, chat_template=None, bos="", eos="", stop_ids=()):
        self.spec, self.bos, self.config = spec, bos, {}
        if not {"model", "added_tokens"} <= spec.keys():
            raise ValueError(
                "tokenizer.json has no model or no added_tokens: it is damaged, or no tokenizer of the `tokenizers` library"
            )
        pattern, self.normalizer = _splitting_rule(spec)
        byte_of = _byte_of_char()
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        vocab = spec["model"]["vocab"]
        ranks = {
            bytes(byte_of[c] for c in token): id
            for token, id in vocab.items()
            if token not in self.special
        }
        merges = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
        order = [vocab[a + b] for a, b in merges]
        if order != sorted(
            order
        ):  # tiktoken merges by id, so ids must follow the order of the merges
            raise ValueError(
                "this tokenizer's ids do not follow its merges, so tiktoken cannot run it"
            )
        if len({*order}) < sum(len(token) > 1 for token in ranks) and not spec["model"].get(
            "ignore_merges"
        ):
            raise ValueError(
                "this tokenizer has tokens that none of its merges makes, so tiktoken would use what the library does not"
            )
        self.encoding = tiktoken.Encoding(
            "nanorl", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special
        )
        self.n_tokens = 1 + max(
            *ranks.values(), *self.special.values()
        )  # ids are 0 .. n_tokens - 1
        self.known = {
            *ranks.values(),
            *self.special.values(),
        }  # all of them, but where added tokens leave a gap
        self.missing = {
            byte for byte in range(256) if bytes([byte]) not in ranks
        }  # SmolLM2 lacks 21

        # ---- the chat
        self.style = style_of(self.special)
        roles = {self.style.start, self.style.role_end, self.style.end} if self.style else set()
        document_end = next(
            (name for name in (DOCUMENT_END, "<|end_of_text|>") if name in self.special), None
        )
        # Added tokens that are not marked special, such as Qwen3's <think>, are words of the text.
        added = {
            token["content"]: token
            for token in spec["added_tokens"]
            if not token["special"] and token["content"] not in {*roles, document_end}
        }
        for name, token in added.items():
            if (
                token.get("lstrip")
                or token.get("rstrip")
                or token.get("single_word")
                or token.get("normalized")
                and self.normalizer
            ):
                raise ValueError(
                    f"the added token {name!r} strips white space, stands alone or is normalised: that is not supported"
                )
        self.words = (
            re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))))
            if added
            else None
        )  # the longest first
        self.turn_end = self.special[self.style.end] if self.style else None
        self.document_end = (
            self.special[document_end] if document_end else self.turn_end
        )  # the boundary token between documents
        self.bos_id = {"bos_token_id": self.special[bos]} if bos in self.special else {}
        self.stop_ids = sorted(
            {self.turn_end, self.document_end, *stop_ids} - {None}
        )  # a completion ends with one of these
        if self.style:
            self.chat_template = chat_template or self.style.template
            self.opening = read_template(self.chat_template, self.style, bos, eos)
            self.opens_alone, self.opens_with_system = (
                self._splice(*self._specials(text))
                for text in (self.opening.alone, self.opening.before)
            )  # ids
            self.inside = self._specials(self.opening.inside)  # ids and texts

    @classmethod
    def train(cls, texts, vocab_size, pattern=PATTERN):
        """Train byte-level BPE on an iterator of strings. The result may have fewer than `vocab_size` tokens
        when the text has no more pairs to merge."""
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            special_tokens=[DOCUMENT_END, CHATML.start, CHATML.end],
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return cls(json.loads(bpe.to_str()))

    @classmethod
    def from_pretrained(cls, path):
        """Read `path`/tokenizer.json and, where they are there, what tokenizer_config.json, chat_template.jinja and
        generation_config.json say about the chat. Raises ValueError naming what nanorl does not implement."""
        there = lambda name: os.path.exists(os.path.join(path, name))
        read = lambda name: read_json(os.path.join(path, name)) if there(name) else {}
        if not there("tokenizer.json"):
            raise ValueError(
                f"no tokenizer.json in {path!r}"
                + (
                    ": a SentencePiece tokenizer (tokenizer.model) is not supported"
                    if there("tokenizer.model")
                    else ""
                )
            )
        config, stops = (
            read("tokenizer_config.json"),
            read("generation_config.json").get("eos_token_id"),
        )
        template = config.get("chat_template")
        bos, eos = (
            token["content"] if isinstance(token, dict) else token or ""
            for token in (config.get("bos_token"), config.get("eos_token"))
        )
        if there("chat_template.jinja"):
            with open(os.path.join(path, "chat_template.jinja"), encoding="utf-8") as f:
                template = f.read()
        if isinstance(template, list):  # several, by name
            template = {one["name"]: one["template"] for one in template}.get("default")
        stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
        try:
            tokenizer = cls(
                read_json(os.path.join(path, "tokenizer.json")), template, bos, eos, stops
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        tokenizer.config = {
            key: value
            for key, value in config.items()
            if value is not None
            and key not in ("chat_template", "backend", "is_local", "local_files_only")
        }
        return tokenizer

    def save(self, path):
        """Write tokenizer.json and what transformers needs beside it: what a published tokenizer_config.json said, and over it the end of a turn as the
        end of a text. `tokenizer_class` is stated, because for some model types AutoTokenizer would otherwise pick another tokenizer and give other ids."""
        name_of = {id: name for name, id in self.special.items()}
        config = {
            "pad_token": name_of[self.document_end],
            "clean_up_tokenization_spaces": False,
            **self.config,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": name_of[self.turn_end],
            **({"bos_token": self.bos} if self.bos else {}),
        }
        for name, text in [
            ("tokenizer.json", json.dumps(self.spec, ensure_ascii=False)),
            ("tokenizer_config.json", json.dumps(config, indent=2)),
            ("chat_template.jinja", self.chat_template),
        ]:
            with open(os.path.join(path, name), "w", encoding="utf-8") as f:
                f.write(text)

    def encode(self, text):
        """str -> list of ids, those of the `tokenizers` library. The spelling of a special token is ordinary text."""
        if self.words is None:
            return self._encode_plain(text)
        ids, at = [], 0
        for word in self.words.finditer(text):  # found before normalisation, as the library does
            ids += self._encode_plain(text[at : word.start()]) + [self.special[word[0]]]
            at = word.end()
        return ids + self._encode_plain(text[at:])

    def _encode_plain(self, text):
        if self.normalizer == "NFC":
            text = unicodedata.normalize("NFC", text)
        if self.missing and not self.missing.isdisjoint(text.encode(errors="replace")):
            return self._slow.encode(
                text, add_special_tokens=False
            ).ids  # tiktoken cannot leave bytes out
        return self.encoding.encode_ordinary(text)

    @cached_property
    def _slow(self):
        return tokenizers.Tokenizer.from_str(
            json.dumps({**self.spec, "added_tokens": []})
        )  # so that no text is a special token, however it is marked

    def encode_many(self, texts):
        """encode() of each, in a thread per core: tiktoken works outside of Python's lock."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids):
        """ids -> str. Bytes that are not UTF-8 become U+FFFD."""
        return self.encoding.decode_bytes([i for i in ids if i in self.known]).decode(
            "utf-8", errors="replace"
        )

    def render_prompt(self, messages):
        """Chat messages -> ids that end where the assistant starts to write."""
        return self._turns(messages)[0] + self._splice(*self._head("assistant"))

    def render_chat(self, messages):
        """Chat messages -> (ids, mask) of equal length; mask is 1 on what the assistant must learn to produce:
        its words and the token that ends its turn."""
        return self._turns(messages)

    def _turns(self, messages):
        if self.style is None:
            raise ValueError(
                "this tokenizer has no chat tokens: nanorl knows ChatML's (<|im_start|>, <|im_end|>) and Llama-3's (<|start_header_id|>, <|eot_id|>)"
            )
        opening, with_system = self.opening, bool(messages) and messages[0]["role"] == "system"
        ids = list(self.opens_with_system if with_system else self.opens_alone)
        mask = [0] * len(ids)
        for number, message in enumerate(messages):
            said = (
                message["content"].strip()
                if message["role"] in opening.strips
                else message["content"]
            )
            head = self._head(message["role"])
            if message["role"] == "assistant":
                # Encoded apart from the header, so that training sees the very ids that sampling continues from.
                head, said = self._splice(*head), self._splice(said, self.turn_end)
            else:
                inside = self.inside if with_system and number == 0 else []
                head, said = self._splice(*head, *inside, said, self.turn_end), []
            tail = self._splice(self.style.tail)
            ids += head + said + tail
            mask += [0] * len(head) + [1] * len(said) + [0] * len(tail)
        return ids, mask

    def _head(self, role):
        """The head of a turn as ids and texts. A role may come from a file, so its name is a text."""
        style = self.style
        return [
            self.special[style.start],
            role,
            *([self.special[style.role_end]] if style.role_end else []),
            style.gap,
        ]

    def _specials(self, text):
        """A template's own text -> its special tokens, as ids, and the texts between them."""
        names = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        return [self.special.get(piece, piece) for piece in re.split(f"({names})", text)]

    def _splice(self, *parts):
        """Ids and texts -> ids; texts that touch are encoded as one."""
        ids, text = [], ""
        for part in (*parts, None):
            if isinstance(part, str):
                text += part
            else:
                ids += self.encode(text) + ([] if part is None else [part])
                text = ""
        return ids
