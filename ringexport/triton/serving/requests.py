"""What a request asks for: tensors become a prompt and sampling parameters."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ringexport.errors import ConfigError
from ringexport.runtime.sampling import SamplingParams
from ringexport.runtime.session import Engine

__all__ = ["Wanted", "read_request"]

ReadTensor = Callable[[str], npt.NDArray[Any] | None]
Array = npt.NDArray[Any]

_SAMPLING = {
    "max_new_tokens": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "repetition_penalty": float,
    "seed": int,
    "ignore_eos": bool,
    "skip_special_tokens": bool,
}
_PROMPTS = ("text_input", "input_ids", "messages")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a request asks for.

    Attributes:
        prompt: token ids; None if the request has no prompt, which may only end a session.
        whole: whether the prompt is a chat from its beginning on.
        stream: a response for each piece.
        params: how to continue.
    """

    prompt: list[int] | None
    whole: bool
    stream: bool
    params: SamplingParams


def read_request(read: ReadTensor, engine: Engine) -> Wanted:
    """Read the tensors of a request.

    Args:
        read: returns an input tensor, None if the request lacks it.
        engine: knows tokenizer and chat template.

    Raises:
        ConfigError: two prompts, or a tensor that cannot be used.
        CheckpointError: messages, but no usable chat template.
    """
    given = [name for name in _PROMPTS if read(name) is not None]
    if len(given) > 1:
        raise ConfigError(f"the request has {' and '.join(given)}, expected one of them")
    values: dict[str, Any] = {}
    for name, kind in _SAMPLING.items():
        array = read(name)
        if array is not None:
            values[name] = kind(_single(name, array))
    stop = read("stop")
    return Wanted(
        prompt=_prompt(given[0], read, engine) if given else None,
        whole=given == ["messages"],
        stream=_flag(read, "stream", default=False),
        params=SamplingParams(**values, stop=() if stop is None else _texts("stop", stop)),
    )


def _prompt(name: str, read: ReadTensor, engine: Engine) -> list[int]:
    array = read(name)
    assert array is not None
    if name == "input_ids":
        return [int(index) for index in array.reshape(-1)]
    text = _text(name, _single(name, array))
    if name == "messages":
        thinking = _flag(read, "thinking", default=True)
        text = engine.chat_prompt(_messages(text), thinking=thinking)
    return engine.tokenizer.encode(text)


def _messages(text: str) -> list[Any]:
    try:
        messages = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"messages is not JSON: {error}") from error
    if not isinstance(messages, list):
        raise ConfigError(f"messages is {str(messages)[:80]!r}, expected a list of messages")
    return messages


def _flag(read: ReadTensor, name: str, *, default: bool) -> bool:
    array = read(name)
    return default if array is None else bool(_single(name, array))


def _texts(name: str, array: Array) -> list[str]:
    return [_text(name, value) for value in array.reshape(-1)]


def _text(name: str, value: object) -> str:
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error


def _single(name: str, array: Array) -> Any:
    if array.size != 1:
        raise ConfigError(f"{name} has {array.size} values, expected one")
    value = array.reshape(-1)[0]
    return value.item() if isinstance(value, np.generic) else value
