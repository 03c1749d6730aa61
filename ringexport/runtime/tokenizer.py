"""The tokenizer of a model folder: text to ids, ids to text piece by piece, and the stop ids."""

import codecs
import contextlib
import functools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from ringexport.errors import CheckpointError, ConfigError
from ringexport.files import file_exists, resolve_inside
from ringexport.runtime.chat import ChatTemplate
from ringexport.strict_json import read_object
from ringexport.tokenizer_errors import TOKENIZER_HINT, TokenizerErrors

__all__ = ["ModelTokenizer", "TextDecoder"]

Json = Any  # what json.loads returns; every use narrows it
MAX_FILE_BYTES = 200_000_000
NO_BYTE = "\ufffd"


class ModelTokenizer:
    """A byte-level BPE tokenizer with the special ids and the chat template of its checkpoint.

    Attributes:
        stop_ids: ids that end a text: of config.json, generation_config.json and the
            tokenizer's own end token (the published config.json names only one of two).
        special_ids: ids that are no text.
        chat_template: None if the checkpoint has none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        special_ids: frozenset[int],
        stop_ids: frozenset[int],
        chat_template: ChatTemplate | None,
    ) -> None:
        self._tokenizer = tokenizer
        # The character with the number of a symbol's byte; one beyond all bytes for what is none.
        self._character_of = dict.fromkeys(range(256), NO_BYTE)
        self._character_of |= {ord(symbol): chr(byte) for byte, symbol in enumerate(byte_symbols())}
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str | None] = {}
        self.special_ids = special_ids
        self.stop_ids = stop_ids
        self.chat_template = chat_template

    @classmethod
    def open(cls, directory: Path, *, vocab_size: int) -> "ModelTokenizer":
        """Read tokenizer.json and the config files beside it.

        Args:
            directory: of a checkpoint, or model/ of a bundle.
            vocab_size: rows of the model's embedding; it may be larger than the vocabulary.

        Raises:
            CheckpointError: a file is missing or damaged, the tokenizer is not byte-level BPE,
                or vocabulary and special ids disagree with the model.
        """
        path = directory / "tokenizer.json"
        data = _read_json(directory, path.name)
        if not _is_byte_level(data.get("decoder")):
            raise CheckpointError(
                f"{path} does not describe a byte-level tokenizer: its decoder is"
                f" {str(data.get('decoder'))[:80]}",
                hint="models of this family use byte-level BPE; other tokenizers are not supported",
            )
        with TokenizerErrors(path):
            tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        _check_vocabulary(tokenizer, path, vocab_size)
        _check_added(tokenizer, path, data.get("added_tokens"))
        config = _read_optional(directory, "tokenizer_config.json")
        model_config = _read_optional(directory, "config.json")
        generation = _read_optional(directory, "generation_config.json")
        names = _special_names(tokenizer, directory / "tokenizer_config.json", config)
        added = tokenizer.get_added_tokens_decoder()
        stop_ids = _token_ids(directory / "config.json", model_config, "eos_token_id")
        stop_ids += _token_ids(directory / "generation_config.json", generation, "eos_token_id")
        stop_ids += [names["eos_token"]] if "eos_token" in names else []
        _check_special(tokenizer, directory, stop_ids, added, vocab_size)
        pad = _token_ids(directory / "config.json", model_config, "pad_token_id")
        if pad and "pad_token" in names and names["pad_token"] != pad[0]:
            raise CheckpointError(
                f"{directory / 'config.json'} has pad_token_id {pad[0]}, tokenizer_config.json's"
                f" {config['pad_token']!r} is {names['pad_token']}",
                hint=TOKENIZER_HINT,
            )
        return cls(
            tokenizer,
            special_ids=frozenset(index for index, token in added.items() if token.special),
            stop_ids=frozenset(stop_ids),
            chat_template=ChatTemplate.find(directory, config),
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; the texts of special tokens become special tokens.

        Raises:
            ConfigError: the text holds half a surrogate pair.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                f"the text is not valid Unicode: lone surrogate at character {error.start}",
                hint="check the encoding of the prompt; it must be UTF-8",
            ) from error
        # `encode` would hold the interpreter's lock, for seconds where a text has megabytes.
        (found,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        ids: list[int] = found.ids
        return ids

    def least_tokens(self, text: str) -> int:
        """Return a number of tokens that `encode` gives at least, without the work of it.

        It is 0 where the tokenizer may drop or rewrite characters.
        """
        return -(-len(text) // self._longest_token) if self._longest_token else 0

    @functools.cached_property
    def _longest_token(self) -> int:
        return _longest_token(self._tokenizer)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        decoder = self.decoder(skip_special_tokens=skip_special_tokens)
        return "".join([decoder.feed(token) for token in ids]) + decoder.flush()

    def decoder(self, *, skip_special_tokens: bool = True) -> "TextDecoder":
        """Return a decoder that takes one id at a time."""
        return TextDecoder(self, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that an id stands for; none for ids without a token."""
        found = self._bytes.get(token)
        if found is None:
            text = self._tokenizer.id_to_token(token) or ""
            try:
                found = text.translate(self._character_of).encode("latin-1")
            except UnicodeEncodeError:  # an added token is plain text, not of byte symbols
                found = text.encode()
            self._bytes[token] = found
        return found

    def token_text(self, token: int) -> str | None:
        """Return the text that an id stands for by itself; None if it splits a character."""
        try:
            return self._texts[token]
        except KeyError:
            data, text = self.token_bytes(token), None
            with contextlib.suppress(UnicodeDecodeError):
                text = data.decode("utf-8")
            self._texts[token] = text
            return text


def _longest_token(tokenizer: Tokenizer) -> int:
    """Return the most characters that a token stands for; 0 if that cannot be said."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder().values()
    keeps_everything = (
        tokenizer.normalizer is None
        and not any(token.lstrip or token.rstrip for token in added)
        and tokenizer.pre_tokenizer is not None
        and _only_splits(json.loads(tokenizer.pre_tokenizer.__getstate__()))
        # A byte that is no symbol of the vocabulary is dropped, or shares an unknown token.
        and isinstance(tokenizer.model, BPE)
        and vocabulary.keys() >= set(byte_symbols())
    )
    # A symbol of the vocabulary is a byte, and a character has at least one of those.
    return max(map(len, vocabulary)) if keeps_everything else 0


def _only_splits(pre_tokenizer: Json) -> bool:
    """Tell whether a pre_tokenizer of tokenizer.json passes on all of a text, as bytes at last."""
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *others, last = parts or [{}]
    return last.get("type") == "ByteLevel" and all(
        part.get("type") in {"Split", "Digits"} and part.get("behavior") != "Removed"
        for part in others
    )


class TextDecoder:
    """Turns ids into text, one at a time, without ever splitting a character.

    Each id costs time in proportion to its own bytes, however long the text is.
    """

    def __init__(self, tokenizer: ModelTokenizer, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside = False  # of a character, whose other bytes are still to come

    def feed(self, token: int) -> str:
        """Return the characters that `token` completes, possibly none."""
        if token in self._skipped:
            return ""
        if not self._inside:
            text = self._tokenizer.token_text(token)
            if text is not None:
                return text
        text = self._utf8.decode(self._tokenizer.token_bytes(token))
        self._inside = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        """Return what is left at the end: U+FFFD for the start of a character, or nothing."""
        return self._utf8.decode(b"", final=True)


def byte_symbols() -> list[str]:
    """Return the printable symbol of each byte 0..255 that byte-level vocabularies use.

    Source: the GPT-2 encoder; `tokenizers` ByteLevel has the same table.
    """
    kept = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = (chr(256 + offset) for offset in range(256 - len(kept)))
    return [chr(byte) if byte in kept else next(moved) for byte in range(256)]


def _read_json(directory: Path, name: str) -> dict[str, Json]:
    """Read the JSON object in a regular file of the folder."""
    path = resolve_inside(directory, name, error=CheckpointError)
    limit = MAX_FILE_BYTES
    return read_object(path, limit_bytes=limit, error=CheckpointError, hint=TOKENIZER_HINT)


def _read_optional(directory: Path, name: str) -> dict[str, Json]:
    return _read_json(directory, name) if file_exists(directory / name) else {}


def _is_byte_level(decoder: Json) -> bool:
    """Tell whether a decoder of tokenizer.json is ByteLevel, alone or as the only one in a list."""
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders")
        return isinstance(parts, list) and len(parts) == 1 and _is_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


def _check_vocabulary(tokenizer: Tokenizer, path: Path, vocab_size: int) -> None:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise CheckpointError(f"{path} has an empty vocabulary", hint=TOKENIZER_HINT)
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise CheckpointError(
            f"{path} gives {token!r} the id {largest}, the model has only {vocab_size} ids",
            hint=TOKENIZER_HINT,
        )


def _check_added(tokenizer: Tokenizer, path: Path, added: Json) -> None:
    """Check that the library kept the ids of added tokens; it renumbers those that leave gaps."""
    for entry in added if isinstance(added, list) else []:
        stored, content = entry.get("id"), entry.get("content")
        found = tokenizer.token_to_id(content)
        if found != stored:
            raise CheckpointError(
                f"{path} gives the added token {content!r:.80} the id {stored}, where the"
                f" tokenizers library gives it {found}",
                hint=TOKENIZER_HINT,
            )


def _special_names(tokenizer: Tokenizer, path: Path, config: Mapping[str, Json]) -> dict[str, int]:
    """Return the ids of the special tokens that tokenizer_config.json names."""
    names = {}
    for key in ("bos_token", "eos_token", "pad_token"):
        value = config.get(key)
        token = value.get("content") if isinstance(value, dict) else value
        if token is None:
            continue
        index = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if index is None:
            raise CheckpointError(
                f"{path} names {token!r} as its {key}, which is not in the vocabulary",
                hint=TOKENIZER_HINT,
            )
        names[key] = index
    return names


def _token_ids(path: Path, config: Mapping[str, Json], key: str) -> list[int]:
    """Return a key that holds an id, a list of ids, or nothing."""
    value = config.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    for item in values:
        if type(item) is not int:
            raise CheckpointError(f"{path} has the {key} {item!r}, expected an id")
    return values


def _check_special(
    tokenizer: Tokenizer,
    directory: Path,
    stop_ids: Iterable[int],
    added: Mapping[int, Any],
    vocab_size: int,
) -> None:
    """Check that each stop id is a token of its own in the tokenizer."""
    for index in stop_ids:
        if not 0 <= index < vocab_size:
            raise CheckpointError(
                f"the eos_token_id {index} in {directory} is out of range: the model has"
                f" {vocab_size} ids",
                hint=TOKENIZER_HINT,
            )
        if index not in added:
            token = tokenizer.id_to_token(index)
            what = "no token" if token is None else f"the ordinary token {token!r}"
            raise CheckpointError(
                f"the eos_token_id {index} in {directory} is {what} in tokenizer.json",
                hint=TOKENIZER_HINT,
            )
