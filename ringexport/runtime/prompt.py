"""What a prompt can be: a text, token ids, or the messages of a chat."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ringexport.errors import ConfigError
from ringexport.runtime.chat import Message

__all__ = ["Prompt", "split_prompt"]

Prompt = str | Sequence[int] | npt.NDArray[np.integer[Any]] | Sequence[Message]
"""A text, token ids, or the messages of a chat."""

_EXPECTED = "expected a text, token ids or chat messages"


def split_prompt(prompt: object) -> tuple[str, list[Any]]:
    """Tell what a prompt that is no text consists of.

    Args:
        prompt: integers, those of numpy too, or messages.

    Returns:
        "ids" and the ids as int, or "messages" and the messages.

    Raises:
        ConfigError: nothing, something else, or a mixture.
    """
    if isinstance(prompt, np.ndarray):
        if prompt.ndim != 1 or not np.issubdtype(prompt.dtype, np.integer):
            raise ConfigError(
                f"the prompt is an array of {prompt.dtype} of shape {list(prompt.shape)},"
                " expected integers of shape [tokens]"
            )
        prompt = prompt.tolist()
    if isinstance(prompt, str | bytes | Mapping) or not isinstance(prompt, Iterable):
        raise ConfigError(f"the prompt is a {type(prompt).__name__}, {_EXPECTED}")
    items = list(prompt)
    if not items:
        raise ConfigError("the prompt is empty", hint="give at least one character")
    if set(map(type, items)) == {int}:  # nearly always; a long prompt has many
        return "ids", items
    kinds = {_kind(item, index) for index, item in enumerate(items)}
    if len(kinds) > 1:
        raise ConfigError("the prompt mixes token ids and messages")
    kind = kinds.pop()
    return kind, [int(item) for item in items] if kind == "ids" else items


def _kind(item: object, index: int) -> str:
    if isinstance(item, int | np.integer) and not isinstance(item, bool):
        return "ids"
    if isinstance(item, Mapping):
        return "messages"
    hint = "give several texts as a list, to generate or generate_batch"
    raise ConfigError(
        f"item {index} of the prompt is a {type(item).__name__}, {_EXPECTED}",
        hint=hint if isinstance(item, str) else None,
    )
