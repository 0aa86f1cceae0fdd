"""Text <-> token ids: byte-level BPE, and chats as ids.

A tokenizer is trained by `tokenizers` or published with a model. It is stored as tokenizer.json
and run by tiktoken.

A chat is spliced as ids: the special tokens are put in by number, and every text is encoded as
plain text. So "<|im_end|>" inside a user's message stays six ordinary pieces and can never end a
turn.

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

# Qwen's pattern: words with their leading space, single digits, runs of punctuation, line breaks,
# white space. Single digits measured best for arithmetic (docs/log.md): a number's length is
# visible and columns line up.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2's pattern, which tokenizers' ByteLevel(use_regex=True) applies.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same after Digits has cut the text before and after each digit ("" for %s) or each run of
# digits ("+"). No piece and no look ahead reaches over such a cut.
DIGITS_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)

# tiktoken's regular expressions end in a panic at a million characters of white space in a row. A
# text that is longer than this is encoded by the library.
LONGEST_TEXT = 500_000

DOCUMENT_END = "<|endoftext|>"  # ends a text in pretraining
LLAMA3_DOCUMENT_END = "<|end_of_text|>"  # Llama-3's name for it


def read_json(file):
    """Read a JSON file. Raises ValueError that names the file when it is damaged."""
    with open(file, encoding="utf-8-sig") as f:
        try:
            return json.load(f)
        except ValueError as error:
            raise ValueError(
                f"{file} cannot be read ({error}): the file is damaged or cut short"
            ) from None


# ---- tokenizer.json: what nanorl can run, and how it is read


def _byte_of_char():
    """GPT-2's table {char: byte}: tokenizer.json writes each byte as one printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}

    # The other bytes take the characters from 256 on.
    others = [byte for byte in range(256) if byte not in printable]
    for i, byte in enumerate(others):
        table[chr(256 + i)] = byte
    return table


def _check_model(model):
    """Raises ValueError that names what is not byte-level BPE."""
    if model["type"] != "BPE":
        raise ValueError(
            f"tokenizer model {model['type']!r} is not supported: nanorl reads byte-level BPE"
        )
    if model.get("byte_fallback"):
        raise ValueError(
            "a SentencePiece-style tokenizer (BPE with byte_fallback) is not supported: "
            "nanorl reads byte-level BPE"
        )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"tokenizer with {name}={model[name]!r} is not supported")


def _normalizer_of(spec):
    """The normaliser's name, "NFC" or None. Raises ValueError that names another one."""
    normalizer = (spec.get("normalizer") or {}).get("type")
    if normalizer not in (None, "NFC"):
        raise ValueError(
            f"tokenizer normaliser {normalizer!r} is not supported: nanorl knows NFC or none"
        )
    return normalizer


def _pattern_of(spec):
    """The regular expression that cuts a text into pieces. BPE merges within a piece only.

    Raises ValueError that names the pre-tokenizer when nanorl does not know it.
    """
    pre_tokenizer = spec.get("pre_tokenizer") or {}
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step.get("type") for step in steps] or [None]

    # The last step must write bytes as characters. It may also cut by GPT-2's pattern.
    if kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        cuts = steps[-1].get("use_regex", True)
        if cuts and kinds == ["ByteLevel"]:
            return GPT2_PATTERN
        if cuts and kinds == ["Digits", "ByteLevel"]:
            return DIGITS_PATTERN % ("" if steps[0].get("individual_digits") else "+")
        if not cuts and kinds == ["Split", "ByteLevel"] and _keeps_matches(steps[0]):
            return steps[0]["pattern"]["Regex"]
    raise ValueError(
        f"pre-tokenizer {kinds} is not supported: "
        "nanorl knows ByteLevel, alone or after Digits or Split"
    )


def _keeps_matches(split):
    """Whether a Split step makes each match of a regular expression a piece, as tiktoken does."""
    if "Regex" not in split.get("pattern", {}):
        return False
    return (split.get("behavior"), bool(split.get("invert"))) == ("Isolated", False)


def _ranks_of(model, special):
    """{bytes of a token: id} for all tokens of the vocabulary but the special ones."""
    byte_of = _byte_of_char()
    ranks = {}
    for token, token_id in model["vocab"].items():
        if token not in special:
            ranks[bytes(byte_of[char] for char in token)] = token_id
    return ranks


def _check_merges(model, ranks):
    """Raises ValueError when tiktoken would give other ids than the `tokenizers` library."""
    # The ids that the merges make, in the order of the merges. A merge is "a b" or ["a", "b"].
    made = []
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        made.append(model["vocab"][first + second])

    # tiktoken merges by id, so ids must follow the order of the merges.
    if made != sorted(made):
        raise ValueError("this tokenizer's ids do not follow its merges, so tiktoken cannot run it")

    # tiktoken uses tokens that no merge makes. The library does so only with ignore_merges.
    n_longer = sum(len(token) > 1 for token in ranks)
    if len(set(made)) < n_longer and not model.get("ignore_merges"):
        raise ValueError(
            "this tokenizer has tokens that none of its merges makes, "
            "so tiktoken would use what the library does not"
        )


def _words_of(added_tokens, not_words, normalizer):
    """A regular expression for the added tokens that are words of a text, or None without any.

    Such are the added tokens that are not marked special, for example Qwen3's <think>.
    not_words: names of tokens that surround texts, whatever their mark.
    Raises ValueError that names a token which is matched in a way nanorl does not know.
    """
    words = {}
    for token in added_tokens:
        if not token["special"] and token["content"] not in not_words:
            words[token["content"]] = token

    for name, token in words.items():
        strips = token.get("lstrip") or token.get("rstrip")
        normalized = token.get("normalized") and normalizer
        if strips or token.get("single_word") or normalized:
            raise ValueError(
                f"the added token {name!r} strips white space, stands alone or is normalised: "
                "that is not supported"
            )
    return re.compile(_any_of(words)) if words else None


def _any_of(names):
    """The regular expression that matches any of the names, the longest first."""
    longest_first = sorted(names, key=len, reverse=True)
    return "|".join(re.escape(name) for name in longest_first)


# ---- a published tokenizer's other files


def _read_if_exists(path, name):
    """The JSON file `path`/`name`, or {} where there is none."""
    file = os.path.join(path, name)
    return read_json(file) if os.path.exists(file) else {}


def _read_template_text(path, config):
    """A published chat template, or None: its own file comes before tokenizer_config.json."""
    file = os.path.join(path, "chat_template.jinja")
    if os.path.exists(file):
        with open(file, encoding="utf-8-sig") as f:
            return f.read()
    template = config.get("chat_template")
    if isinstance(template, list):
        # There are several, by name.
        template_of = {entry["name"]: entry["template"] for entry in template}
        return template_of.get("default")
    return template


def _token_text(token):
    """The text of a token in tokenizer_config.json: a dict, a string or None (no token: "")."""
    if isinstance(token, dict):
        return token["content"]
    return token or ""


def _as_list(ids):
    """The ids of generation_config.json, where they are a list, one id or None."""
    if isinstance(ids, list):
        return ids
    return [] if ids is None else [ids]


class Tokenizer:
    """Byte-level BPE with a chat format.

    spec: the parsed tokenizer.json.
    chat_template: a Jinja template. None: the plain one of the style whose tokens the spec has.
    bos, eos: tokens that a template may name.
    stop_ids: ids that end a completion besides the end of a turn and of a document.

    Raises ValueError that names what nanorl does not implement.
    """

    def __init__(self, spec, chat_template=None, bos="", eos="", stop_ids=()):
        if not {"model", "added_tokens"} <= spec.keys():
            raise ValueError(
                "tokenizer.json has no model or no added_tokens: "
                "it is damaged, or no tokenizer of the `tokenizers` library"
            )
        added_tokens = spec["added_tokens"]
        self.spec = spec
        self.config = {}  # what a published tokenizer_config.json says
        try:
            pattern, ranks = self._read_spec(spec)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"tokenizer.json is damaged, or not as nanorl knows it ({error!r})"
            ) from error
        self.encoding = tiktoken.Encoding(
            "nanorl", pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special
        )

        # Ids are 0 .. n_tokens - 1. All are known, unless added tokens leave a gap before them.
        self.n_tokens = 1 + max(*ranks.values(), *self.special.values())
        self.known = {*ranks.values(), *self.special.values()}

        # Bytes without a token. SmolLM2 lacks 21.
        self.missing = {byte for byte in range(256) if bytes([byte]) not in ranks}

        # The tokens that surround turns and documents, and the added tokens that are words.
        self.style = style_of(self.special)
        self.turn_end = self.special[self.style.end] if self.style else None
        document_end = self._name_document_end()
        not_words = {document_end}
        if self.style:
            not_words |= {self.style.start, self.style.role_end, self.style.end}
        self.words = _words_of(added_tokens, not_words, self.normalizer)

        # The boundary between documents, and the ids of which each ends a completion.
        self.document_end = self.special[document_end] if document_end else self.turn_end
        self.stop_ids = sorted({self.turn_end, self.document_end, *stop_ids} - {None})

        # How a chat opens.
        self.bos = bos
        self.bos_id = {"bos_token_id": self.special[bos]} if bos in self.special else {}
        if self.style:
            self._read_opening(chat_template or self.style.template, eos)

    def _read_spec(self, spec):
        """Read the normaliser and the special tokens -> (pattern, ranks) for tiktoken."""
        model = spec["model"]
        _check_model(model)
        self.normalizer = _normalizer_of(spec)
        pattern = _pattern_of(spec)
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        ranks = _ranks_of(model, self.special)
        _check_merges(model, ranks)
        return pattern, ranks

    def _name_document_end(self):
        """The token that ends a document, or None."""
        for name in (DOCUMENT_END, LLAMA3_DOCUMENT_END):
            if name in self.special:
                return name
        return None

    def _read_opening(self, chat_template, eos):
        """Keep what a chat template writes before the first turn, as ids where that can be."""
        self.chat_template = chat_template
        self.opening = read_template(chat_template, self.style, self.bos, eos)
        self.opens_alone = self._splice(*self._specials(self.opening.alone))
        self.opens_with_system = self._splice(*self._specials(self.opening.before))

        # Ids and texts: a text at the end is encoded together with the system's words.
        self.inside = self._specials(self.opening.inside)

    @classmethod
    def train(cls, texts, vocab_size, pattern=PATTERN):
        """Train byte-level BPE on an iterator of strings.

        The result has fewer than `vocab_size` tokens when the text has no more pairs to merge.
        """
        bpe = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
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
        """Read `path`/tokenizer.json and what the files beside it say about the chat.

        Those are tokenizer_config.json, chat_template.jinja and generation_config.json. Each may
        be absent. Raises ValueError naming what nanorl does not implement.
        """
        spec_file = os.path.join(path, "tokenizer.json")
        if not os.path.exists(spec_file):
            problem = f"no tokenizer.json in {path!r}"
            if os.path.exists(os.path.join(path, "tokenizer.model")):
                problem += ": a SentencePiece tokenizer (tokenizer.model) is not supported"
            raise ValueError(problem)

        config = _read_if_exists(path, "tokenizer_config.json")
        generation_config = _read_if_exists(path, "generation_config.json")
        bos = _token_text(config.get("bos_token"))
        eos = _token_text(config.get("eos_token"))
        template = _read_template_text(path, config)
        stop_ids = _as_list(generation_config.get("eos_token_id"))
        try:
            tokenizer = cls(read_json(spec_file), template, bos, eos, stop_ids)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

        # save() writes these again. It writes the template as a file of its own.
        not_kept = ("chat_template", "backend", "is_local", "local_files_only")
        for key, value in config.items():
            if value is not None and key not in not_kept:
                tokenizer.config[key] = value
        return tokenizer

    def save(self, path):
        """Write tokenizer.json and what transformers needs beside it.

        The configuration is what a published tokenizer_config.json said, and over it the end of a
        turn as the end of a text. `tokenizer_class` is stated, because for some model types
        AutoTokenizer would otherwise pick another tokenizer and give other ids.
        """
        name_of = {token_id: name for name, token_id in self.special.items()}
        config = {
            "pad_token": name_of.get(self.document_end),
            "clean_up_tokenization_spaces": False,
            **self.config,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        if self.style:
            config["eos_token"] = name_of[self.turn_end]
        if self.bos:
            config["bos_token"] = self.bos

        files = {
            "tokenizer.json": json.dumps(self.spec, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(config, indent=2),
        }
        if self.style:
            files["chat_template.jinja"] = self.chat_template
        for name, text in files.items():
            with open(os.path.join(path, name), "w", encoding="utf-8") as f:
                f.write(text)

    def pads_last(self):
        """Whether the highest id is a pad token that no text, no chat and no stop has."""
        pad = _token_text(self.config.get("pad_token"))
        if self.special.get(pad) != self.n_tokens - 1:
            return False
        if self.words and self.words.fullmatch(pad):
            return False
        used = set(self.stop_ids)
        if self.style:
            used.update(self.opens_alone, self.opens_with_system, self.inside)
        return self.special[pad] not in used

    # ---- text <-> ids

    def encode(self, text):
        """str -> list of ids, the same as those of the `tokenizers` library.

        The spelling of a special token is ordinary text.
        """
        if self.words is None:
            return self._encode_plain(text)

        # Words are found before the text is normalised, as in the library.
        ids, start = [], 0
        for word in self.words.finditer(text):
            ids += self._encode_plain(text[start : word.start()])
            ids.append(self.special[word[0]])
            start = word.end()
        return ids + self._encode_plain(text[start:])

    def _encode_plain(self, text):
        """encode() for a text without words."""
        if self.normalizer == "NFC":
            text = unicodedata.normalize("NFC", text)

        # The library leaves out bytes that have no token, and takes a text of any length. tiktoken
        # cannot.
        data = text.encode(errors="replace") if self.missing else b""
        if len(text) > LONGEST_TEXT or not self.missing.isdisjoint(data):
            # Half of a surrogate pair becomes U+FFFD, as in tiktoken.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._library.encode(text, add_special_tokens=False).ids
        return self.encoding.encode_ordinary(text)

    @cached_property
    def _library(self):
        """The same tokenizer in the `tokenizers` library, which is slower.

        It has no added tokens, so no text is a special token, however a token is marked.
        """
        return tokenizers.Tokenizer.from_str(json.dumps({**self.spec, "added_tokens": []}))

    def encode_many(self, texts, threads=None):
        """encode() of each text, in so many threads: tiktoken works outside of Python's lock."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode(self, ids):
        """ids -> str. Unknown ids say nothing. Bytes that are not UTF-8 become U+FFFD."""
        known_ids = [i for i in ids if i in self.known]
        return self.encoding.decode_bytes(known_ids).decode("utf-8", errors="replace")

    # ---- chats -> ids

    def render_prompt(self, messages):
        """Chat messages -> ids that end where the assistant starts to write."""
        ids, _ = self.render_chat(messages)
        return ids + self._splice(*self._head("assistant"))

    def render_chat(self, messages):
        """Chat messages -> (ids, mask), two lists of equal length.

        The mask is 1 on what the assistant must learn to produce: its words and the token that
        ends its turn. Raises ValueError when the tokenizer has no chat tokens.
        """
        if self.style is None:
            raise ValueError(
                "this tokenizer has no chat tokens: nanorl knows ChatML's "
                "(<|im_start|>, <|im_end|>) and Llama-3's (<|start_header_id|>, <|eot_id|>)"
            )

        # What the template puts before the first turn.
        with_system = bool(messages) and messages[0]["role"] == "system"
        ids = list(self.opens_with_system if with_system else self.opens_alone)
        mask = [0] * len(ids)

        tail = self._splice(self.style.tail)
        for number, message in enumerate(messages):
            # Only a system turn that opens the chat has the template's text inside.
            inside = self.inside if with_system and number == 0 else []
            given, learned = self._turn(message, inside)
            ids += given + learned + tail
            mask += [0] * len(given) + [1] * len(learned) + [0] * len(tail)
        return ids, mask

    def _turn(self, message, inside):
        """A message -> its turn up to the tail, in two lists of ids: given, and to be learned.

        inside: ids and texts that come between the head and what is said.
        """
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f"a message has role {role!r} and content {str(content)[:40]!r} "
                f"({type(content).__name__}): both must be texts"
            )
        if role in self.opening.strips:
            content = content.strip()
        head = self._head(role)

        # Only the assistant's words are learned. They are encoded apart from the head, so that
        # training sees the very ids that sampling continues from.
        if role == "assistant":
            return self._splice(*head), self._splice(content, self.turn_end)
        return self._splice(*head, *inside, content, self.turn_end), []

    def _head(self, role):
        """The head of a turn as ids and texts. A role may come from a file, so it is a text."""
        head = [self.special[self.style.start], role]
        if self.style.role_end:
            head.append(self.special[self.style.role_end])
        return [*head, self.style.gap]

    def _specials(self, text):
        """A template's own text -> its special tokens, as ids, and the texts between them."""
        pieces = re.split(f"({_any_of(self.special)})", text)
        return [self.special.get(piece, piece) for piece in pieces]

    def _splice(self, *parts):
        """Ids and texts -> ids. Texts that touch are encoded as one."""
        ids, text = [], ""
        for part in (*parts, None):
            if isinstance(part, str):
                text += part
                continue

            # An id ends the text before it, and None the last one.
            ids += self.encode(text)
            text = ""
            if part is not None:
                ids.append(part)
        return ids
