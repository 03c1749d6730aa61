"""Prompts and results as files: one JSON object a line in, one out."""

import codecs
import difflib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from ringexport.errors import ConfigError, OutputError
from ringexport.runtime.chat import Message, plain_messages
from ringexport.runtime.sampling import SamplingParams
from ringexport.runtime.session import Engine
from ringexport.strict_json import parse_object

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has no flock; there nobody notices a second run
    fcntl = None

__all__ = ["Json", "LineId", "PromptLine", "ResultFile", "read_prompts"]

Json = Any
LineId = str | int
MAX_LINE_BYTES = 64 << 20
MAX_NAMED = 5
SAMPLING_KEYS = tuple(field.name for field in fields(SamplingParams))
KEYS = ("id", "prompt", "messages", "thinking", *SAMPLING_KEYS)
OUTPUT_HINT = "choose a file in a folder that exists, is writable and has room"
RESUME_HINT = "choose another output, or the input that it was made from"
RESULT_START = b'{"id": '
"""What every line of an output begins with."""
OUTCOMES = ("text", "error")


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLine:
    """A line of the input.

    Attributes:
        id: names the prompt in input and output; unique.
        prompt: a text, or the messages of a chat.
        params: how to continue it.
        thinking: of a chat; None leaves it to the caller.
    """

    id: LineId
    prompt: str | list[Message]
    params: SamplingParams
    thinking: bool | None = None

    def encode(self, engine: Engine, *, chat: bool, thinking: bool) -> list[int]:
        """Return the token ids.

        Args:
            engine: has the tokenizer and the chat template.
            chat: put texts into the template too.
            thinking: where the line does not say.

        Raises:
            CheckpointError, ConfigError: no template, or messages that it refuses.
        """
        prompt = self.prompt
        if isinstance(prompt, str):
            if not chat:
                return engine.encode(prompt)
            prompt = [{"role": "user", "content": prompt}]
        wanted = thinking if self.thinking is None else self.thinking
        return engine.encode(engine.chat_prompt(prompt, thinking=wanted))


def read_prompts(path: Path, defaults: SamplingParams) -> Iterator[PromptLine]:
    """Yield the prompts of a file; empty lines are skipped.

    Args:
        path: of the JSON lines.
        defaults: for parameters that a line does not give.

    Raises:
        ConfigError: at the end, naming the lines that cannot be used; or the file cannot be read.
    """
    problems: list[str] = []
    seen: dict[LineId, int] = {}
    for number, data in _lines(path):
        try:
            line = _parse(data, defaults)
        except ConfigError as error:
            problems.append(f"line {number}: {error.message}")
            continue
        first = seen.setdefault(line.id, number)
        if first == number:
            yield line
        else:
            problems.append(f"line {number}: the id {line.id!r:.80} is that of line {first} too")
    if problems:
        more = len(problems) - MAX_NAMED
        named = problems[:MAX_NAMED] + ([f"and {more:,} more"] if more > 0 else [])
        count = "a bad line" if len(problems) == 1 else f"{len(problems):,} bad lines"
        raise ConfigError(
            f"{path} has {count}: " + "; ".join(named),
            hint='a line is {"id": ..., "prompt": "..."} or {"id": ..., "messages": [...]},'
            " and sampling parameters if it needs its own",
        )


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"cannot read {path}: it is no regular file")
        with path.open("rb") as file:
            number = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(data) > MAX_LINE_BYTES:
                    message = f"line {number} of {path} is longer than 64 MiB"
                    raise ConfigError(message, hint="a line holds one prompt")
                if number == 1:  # some editors write a byte order mark
                    data = data.removeprefix(codecs.BOM_UTF8)
                if data.strip():
                    yield number, data
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot read {path}: {reason}") from error


def _parse(data: bytes, defaults: SamplingParams) -> PromptLine:
    values = parse_object(data, source="it", error=ConfigError)
    for key in values.keys() - set(KEYS):
        near = difflib.get_close_matches(key, KEYS, 1)
        guess = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"the key {key!r:.80} is unknown{guess}")
    if type(values.get("id")) not in (str, int):
        raise ConfigError("it has no id, expected a text or an integer")
    thinking = values.get("thinking")
    if thinking is not None and not isinstance(thinking, bool):
        raise ConfigError(f"its thinking is {thinking!r:.80}, expected true or false")
    given = {key: values[key] for key in SAMPLING_KEYS if key in values}
    params = replace(defaults, **given)
    return PromptLine(id=values["id"], prompt=_prompt(values), params=params, thinking=thinking)


def _prompt(values: Mapping[str, Json]) -> str | list[Message]:
    if ("prompt" in values) == ("messages" in values):
        raise ConfigError("expected either a prompt or messages")
    prompt, messages = values.get("prompt"), values.get("messages")
    if isinstance(prompt, str) and prompt:
        return prompt
    if "prompt" in values:
        raise ConfigError("its prompt is no text, or empty")
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise ConfigError('its messages are no list of {"role": "...", "content": ...}')
    plain_messages(messages)
    return messages


def _is_message(value: Json) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


class ResultFile:
    """The output: a line is written when its prompt is finished, in the order of the ends.

    Args:
        path: may exist; a last line that an interrupt cut off is removed.
        known: ids of the input.

    Attributes:
        finished: ids that are in the file.
        failed: those of them whose line is an error.

    Raises:
        ConfigError: the file holds something else, or results of other prompts.
        OutputError: it cannot be read or written, or another run is writing to it.
    """

    def __init__(self, path: Path, known: Iterable[LineId]) -> None:
        self._path = path
        self.finished: set[LineId] = set()
        self.failed: set[LineId] = set()
        try:
            if path.exists() and not path.is_file():
                raise OutputError(f"{path} is no regular file", hint=OUTPUT_HINT)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._lock()
            self._resume(set(known))
        except BaseException:
            self._file.close()
            raise

    def write(self, line: Mapping[str, Json]) -> None:
        """Add a line, which begins with its id, and hand it to the operating system.

        Half surrogate pairs, which UTF-8 cannot hold, become escapes.
        """
        text = json.dumps(line, ensure_ascii=False, allow_nan=False)
        left = memoryview(text.encode("utf-8", "backslashreplace") + b"\n")
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._unusable(error) from error
        self._note(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _lock(self) -> None:
        """Keep other runs out: what one of them writes looks cut off to the other."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            message = f"another run is writing its results to {self._path}"
            raise OutputError(message, hint="wait for it, or choose another output") from error
        except OSError:
            return  # a file system without locks

    def _resume(self, known: set[LineId]) -> None:
        """Read what an earlier run wrote, and cut off a line that it did not finish."""
        try:
            with self._path.open("rb") as file:
                end = 0
                for number, data in enumerate(file, start=1):
                    if not data.endswith(b"\n"):
                        if not _is_cut_off(data):
                            self._checked(number, data, known)
                        break
                    self._note(self._checked(number, data, known))
                    end += len(data)
            os.truncate(self._file.fileno(), end)
        except OSError as error:
            raise self._unusable(error) from error

    def _note(self, line: Mapping[str, Json]) -> None:
        self.finished.add(line["id"])
        if "error" in line:
            self.failed.add(line["id"])

    def _checked(self, number: int, data: bytes, known: set[LineId]) -> dict[str, Json]:
        where = f"line {number} of {self._path}"
        line = parse_object(data, source=where, error=ConfigError, hint=RESUME_HINT)
        found = line.get("id")
        if not any(name in line for name in OUTCOMES):
            raise ConfigError(f"{where} is no result, but something else", hint=RESUME_HINT)
        if type(found) in (str, int) and found in known:
            return line
        raise ConfigError(
            f"{where} is no result of a prompt of this input: its id is {found!r:.80}",
            hint=RESUME_HINT,
        )

    def _unusable(self, error: OSError) -> OutputError:
        reason = (error.strerror or str(error)).lower()
        return OutputError(
            f"the results cannot be written to {self._path}: {reason}",
            hint=OUTPUT_HINT,
        )


def _is_cut_off(data: bytes) -> bool:
    """Tell whether a last line without its end can be what an interrupt has left of a result."""
    shorter = min(len(data), len(RESULT_START))
    if data[:shorter] != RESULT_START[:shorter]:
        return False
    try:
        json.loads(data)
    except ValueError:
        return True
    return False
