"""The checkpoint's own chat template, rendered in a sandbox."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError

from ringexport.errors import CheckpointError, ConfigError
from ringexport.files import file_exists, read_regular, resolve_inside
from ringexport.runtime.chat_sandbox import ChatEnvironment

__all__ = ["ChatTemplate", "Message", "plain_messages"]

Message = Mapping[str, Any]
"""{"role": "user", "content": "..."}, with further keys as the template knows them."""

ROLES = ("system", "developer", "user", "assistant", "tool")
MESSAGE_HINT = 'use {"role": "user", "content": "..."}'
TEMPLATE_NAME = "chat_template.jinja"
MAX_SOURCE = 100_000
MAX_TOKEN = 10_000
HINT = "do not trust this checkpoint, or give the prompt as plain text without the chat template"
RENDER_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a template can make Jinja raise besides TemplateError; RecursionError is a RuntimeError."""


def _local_time() -> datetime:
    return datetime.now().astimezone()


class ChatTemplate:
    """Turns messages into the text that the model was trained on.

    Args:
        source: Jinja.
        where: what to call the template in messages.
        variables: what the template may read besides the messages, such as "eos_token".
        now: the time for the template's strftime_now.

    Raises:
        CheckpointError: the source is no Jinja template, or uses what is not allowed.
    """

    def __init__(
        self,
        source: str,
        *,
        where: str = "the chat template",
        variables: Mapping[str, object] | None = None,
        now: Callable[[], datetime] = _local_time,
    ) -> None:
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"{where} has {len(source)} characters, above {MAX_SOURCE}")
        self.source = source
        self._where = where
        self._variables = dict(variables or {})
        self._environment = ChatEnvironment(now)
        self._template: Template | None = None
        try:
            self._template = self._environment.from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(
                f"{where} is no valid Jinja: line {error.lineno}: {error.message}", hint=HINT
            ) from error
        except (TemplateError, SyntaxError, MemoryError, *RENDER_ERRORS) as error:
            raise self._refused(error) from error

    @classmethod
    def find(cls, directory: Path, config: Mapping[str, Any]) -> "ChatTemplate | None":
        """Return the template of a checkpoint, None if it has none.

        Args:
            directory: chat_template.jinja in it comes before the config's template.
            config: tokenizer_config.json.

        Raises:
            CheckpointError: the template cannot be read or used.
        """
        path = directory / TEMPLATE_NAME
        where, source = str(directory / "tokenizer_config.json"), config.get("chat_template")
        if file_exists(path):
            where, source = str(path), _read_text(directory)
        if isinstance(source, list):
            source = _default_template(source, where)
        if source is None:
            return None
        if not isinstance(source, str):
            raise CheckpointError(f"chat_template in {where} is no text")
        names = [key for key in config if re.fullmatch(r"\w+_token", key)]
        texts = {key: _token_text(config[key]) for key in names}
        variables = {key: text for key, text in texts.items() if isinstance(text, str)}
        for key, text in variables.items():
            if len(text) > MAX_TOKEN:
                raise CheckpointError(
                    f"{key} in {directory / 'tokenizer_config.json'} has {len(text):,} characters,"
                    f" expected at most {MAX_TOKEN:,}"
                )
        return cls(source, where=f"the chat template in {where}", variables=variables)

    def render(
        self,
        messages: Sequence[Message],
        *,
        thinking: bool = True,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the prompt text.

        Args:
            messages: at least one; see `plain_messages`.
            thinking: given to the template as enable_thinking and thinking_option.
            add_generation_prompt: end with the start of the assistant's turn.
            tools: descriptions of functions that the model may call.

        Raises:
            ConfigError: no messages, or one that cannot be used; see `plain_messages`.
            CheckpointError: the template refuses the messages, fails, loops, or does what is
                not allowed.
        """
        readable = plain_messages(messages)
        assert self._template is not None
        self._environment.budget.reset()
        values = self._variables | {
            "messages": readable,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "add_generation_prompt": add_generation_prompt,
            "enable_thinking": thinking,
            "thinking_option": "on" if thinking else "off",
        }
        try:
            return self._template.render(values)
        except (TemplateError, MemoryError, *RENDER_ERRORS) as error:
            raise self._refused(error) from error

    def _refused(self, error: BaseException) -> CheckpointError:
        kind = "is refused" if isinstance(error, SecurityError) else "cannot be used"
        reason = str(error).strip() or type(error).__name__
        return CheckpointError(f"{self._where} {kind}: {reason[:400]}", hint=HINT)


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages as templates read them: each has a known role and a text.

    Templates pass over what they do not know, and the model would answer something else.

    Args:
        messages: as in OpenAI's API: the content is a text, or a list of parts that are texts;
            beside tool calls it may be missing. A developer is the system.

    Raises:
        ConfigError: no messages, or one that cannot be used.
    """
    if not messages:
        raise ConfigError("a chat needs at least one message")
    return [_plain(index, message) for index, message in enumerate(messages)]


def _plain(index: int, message: Message) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        raise ConfigError(f"message {index} has no role", hint=MESSAGE_HINT)
    if role not in ROLES:
        raise ConfigError(
            f"the role of message {index} is {role!r:.80}, expected one of {', '.join(ROLES)}",
            hint=MESSAGE_HINT,
        )
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join([_part_text(index, part) for part in content])
    if content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        kind = "missing" if content is None else f"of type {type(content).__name__}"
        raise ConfigError(
            f"the content of message {index} is {kind}, expected a text", hint=MESSAGE_HINT
        )
    return {**message, "role": "system" if role == "developer" else role, "content": content}


def _part_text(index: int, part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    if not isinstance(text, str):
        raise ConfigError(
            f"the content of message {index} has a part that is no text",
            hint='the model reads only text: {"type": "text", "text": "..."}',
        )
    return text


def _read_text(directory: Path) -> str:
    path = resolve_inside(directory, TEMPLATE_NAME, error=CheckpointError)
    data = read_regular(path, limit_bytes=4 * MAX_SOURCE, error=CheckpointError)
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _default_template(entries: list[Any], where: str) -> object:
    """Return the template named "default" of a list of named ones."""
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise CheckpointError(
                f"chat_template in {where} lists {str(entry)[:80]},"
                " expected objects with a name and a template",
                hint=HINT,
            )
    named = {entry["name"]: entry.get("template") for entry in entries}
    return named.get("default")


def _token_text(value: object) -> object:
    """Return the text of a special token, which may be an object with its text as content."""
    return value.get("content") if isinstance(value, dict) else value
