"""Calibration prompts: named sets that come with ringexport, or the user's own JSON lines."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import ringexport
from ringexport.errors import CalibrationError, CheckpointError
from ringexport.tokenizer_errors import TokenizerErrors

__all__ = ["PromptSet", "Sample", "load_prompts", "shipped_prompts", "tokenize"]

ALL_SETS = "all"
_SUFFIX = ".jsonl"
_LIMIT_BYTES = 1 << 28
_KEYS = ("id", "text", "source")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Texts to calibrate with.

    Attributes:
        name: of a shipped set, of several joined with "+", or of the user's file.
        texts: in the order in which they are used.
        sources: where each text is from, "" if its record does not say.
    """

    name: str
    texts: tuple[str, ...]
    sources: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of the texts in their order, hexadecimal; independent of name and sources."""
        digest = hashlib.sha256()
        for text in self.texts:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Sample:
    """One text as token ids, at least one."""

    ids: tuple[int, ...]


def shipped_prompts() -> tuple[str, ...]:
    """Return the names of the prompt sets that come with ringexport, sorted."""
    return tuple(sorted(path.stem for path in _directory().glob("*" + _SUFFIX)))


def load_prompts(name: str) -> PromptSet:
    """Read prompts.

    Args:
        name: a shipped set; several joined with "+", taken in turns; "all" for all of them; or
            the path of a .jsonl file, recognised by its suffix. One JSON object a line: "text",
            and optionally "id", unique in the file, and "source".

    Raises:
        CalibrationError: no such set, an unreadable file, or a line that is no such record; the
            message says which line.
    """
    if name.endswith(_SUFFIX):
        return _read(Path(name), name)
    known = shipped_prompts()
    names = known if name == ALL_SETS else tuple(name.split("+"))
    for one in names:
        if one not in known:
            nearest = get_close_matches(one[:100], known, n=1)
            raise CalibrationError(
                f"there is no prompt set {one[:100]!r}",
                hint=(f"did you mean {nearest[0]!r}? " if nearest else "")
                + f"choices: {', '.join(known)}, {ALL_SETS}, or a .jsonl file",
            )
    if not names:
        raise CalibrationError(
            f"no prompt sets are installed in {_directory()}",
            hint="reinstall ringexport, or give a .jsonl file of your own",
        )
    sets = [_read(_directory() / (one + _SUFFIX), one) for one in names]
    rows = zip_longest(*(zip(one.texts, one.sources, strict=True) for one in sets))
    pairs = [pair for row in rows for pair in row if pair is not None]
    return PromptSet(
        name="+".join(names),
        texts=tuple(text for text, _ in pairs),
        sources=tuple(source for _, source in pairs),
    )


def tokenize(
    prompts: PromptSet, tokenizer_path: Path, *, num_samples: int, max_tokens: int, vocab_size: int
) -> tuple[Sample, ...]:
    """Turn the first `num_samples` texts into token ids, cut at `max_tokens` each.

    Args:
        prompts: texts; those that give no tokens are passed over.
        tokenizer_path: tokenizer.json of the checkpoint.
        num_samples: at most; fewer if there are fewer texts.
        max_tokens: per sample.
        vocab_size: rows of the model's embedding.

    Raises:
        CheckpointError: no usable tokenizer, or one that gives ids the model does not have.
        CalibrationError: no text gives any token.
    """
    tokenizer = _open_tokenizer(tokenizer_path)
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()
    samples: list[Sample] = []
    for text in prompts.texts:
        if len(samples) == num_samples:
            break
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= vocab_size:
            raise CheckpointError(
                f"{tokenizer_path} gives the token {max(ids)}, expected less than the vocab_size "
                f"{vocab_size} of the model",
                hint="tokenizer and weights are of different models",
            )
        if ids:
            samples.append(Sample(tuple(ids)))
    if not samples:
        raise CalibrationError(f"the prompts {prompts.name} hold no tokens")
    return tuple(samples)


def _open_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise CheckpointError(
            f"there is no {path}, which calibration needs",
            hint="copy the tokenizer files of the checkpoint beside its weights",
        )
    with TokenizerErrors(path):
        return Tokenizer.from_file(str(path))


def _read(path: Path, name: str) -> PromptSet:
    try:
        with path.open("rb") as file:
            data = file.read(_LIMIT_BYTES + 1)
    except OSError as failure:
        raise CalibrationError(f"cannot read {path}: {failure.strerror or failure}") from failure
    if len(data) > _LIMIT_BYTES:
        raise CalibrationError(f"{path} has more than {_LIMIT_BYTES:,} bytes")
    records: list[dict[str, str]] = []
    lines_of_ids: dict[str, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        record = _record(line, f"{path}, line {number}")
        key = record.get("id")
        if key is not None and lines_of_ids.setdefault(key, number) != number:
            raise CalibrationError(
                f"{path}, line {number}: the id {key[:80]!r} is that of line {lines_of_ids[key]}"
            )
        records.append(record)
    if not records:
        raise CalibrationError(f"{path} holds no prompts")
    return PromptSet(
        name=name,
        texts=tuple(record["text"] for record in records),
        sources=tuple(record.get("source", "") for record in records),
    )


def _record(line: bytes, where: str) -> dict[str, str]:
    """Check one line: an object of strings, "text" among them and not blank."""
    example = 'one object a line, such as {"id": "1", "text": "...", "source": "..."}'
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as failure:
        raise CalibrationError(f"{where} is not valid JSON: {failure!s:.120}", hint=example) from (
            failure
        )
    if not isinstance(value, dict):
        raise CalibrationError(
            f"{where} holds a JSON {type(value).__name__}, expected an object", hint=example
        )
    _check_keys(list(value), where, example)
    for key, text in value.items():
        if not isinstance(text, str):
            raise CalibrationError(
                f"{where}: {key} is {text!r:.80}, expected a string", hint=example
            )
    if not value["text"].strip():
        raise CalibrationError(f"{where}: text is blank")
    return value


def _check_keys(keys: Sequence[str], where: str, example: str) -> None:
    unknown = [key for key in keys if key not in _KEYS]
    if unknown:
        nearest = get_close_matches(unknown[0][:100], _KEYS, n=1)
        raise CalibrationError(
            f"{where}: unknown key {unknown[0][:80]!r}",
            hint=f"did you mean {nearest[0]!r}?" if nearest else example,
        )
    if "text" not in keys:
        raise CalibrationError(f"{where} lacks the key 'text'", hint=example)


def _directory() -> Path:
    """Return the folder of the shipped sets: in the package, or in the repository beside it."""
    package = Path(ringexport.__file__).parent
    installed = package / "prompts"
    return installed if installed.is_dir() else package.parent / "calibration" / "prompts"
