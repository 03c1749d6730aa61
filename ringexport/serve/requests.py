"""The requests for text: every field is used, is known to ask for nothing, or is refused."""

from dataclasses import dataclass
from typing import Any

from ringexport.errors import ConfigError
from ringexport.runtime.sampling import SamplingParams
from ringexport.serve.errors import ApiError
from ringexport.serve.fields import Fields, Json
from ringexport.serve.messages import read_messages, read_tools
from ringexport.serve.options import ServeOptions

__all__ = ["ChatRequest", "CompletionRequest", "Wanted", "read_chat", "read_completion"]

MAX_STOP_TEXTS = 16
MAX_STOP_CHARACTERS = 1000
MAX_TOP_LOGPROBS = 20
MAX_TOP_K = 1 << 31
MAX_SEED = (1 << 64) - 1
MIN_SEED = -(1 << 63)
SMALLEST_TOP_P = 1e-9
"""For 0, which OpenAI allows: only the most likely token is left."""
COMPLETION_TOKENS = 16
"""What OpenAI writes for /v1/completions if the request does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What all requests for text have in common.

    Attributes:
        model: as the client calls it, None if it does not.
        params: how to continue the prompt.
        stream: send the text as it is generated.
        include_usage: end a stream with the numbers of tokens.
    """

    model: str | None
    params: SamplingParams
    stream: bool
    include_usage: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A chat to answer.

    Attributes:
        wanted: how.
        messages: for the template.
        tools: that the model may call.
        thinking: whether it thinks first.
    """

    wanted: Wanted
    messages: list[dict[str, Any]]
    tools: list[dict[str, Json]] | None
    thinking: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest:
    """A text, or token ids, to continue."""

    wanted: Wanted
    prompt: str | list[int]


def read_chat(data: Json, options: ServeOptions, *, context: int) -> ChatRequest:
    """Read the body of /v1/chat/completions.

    Args:
        data: the JSON value.
        options: limits and defaults.
        context: tokens that the model can hold.

    Raises:
        ApiError: names the field.
    """
    fields = Fields(data)
    flag, count = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if count is not None and not flag:
        raise fields.error("top_logprobs", "needs logprobs to be true")
    chat = ChatRequest(
        messages=read_messages(fields, most=options.max_messages),
        tools=read_tools(fields, most=options.max_tools),
        thinking=_thinking(fields, default=options.thinking),
        wanted=_wanted(fields, options, context, (count or 0) if flag else None),
    )
    fields.only("modalities", (["text"],), "the model writes only text")
    fields.only("audio", (), "the model writes only text")
    fields.only("prediction", (), "there is no speculative decoding")
    fields.only("reasoning_effort", (), "use chat_template_kwargs.enable_thinking")
    fields.only("verbosity", (), "the model has no such setting")
    fields.only("web_search_options", (), "there is no web search")
    fields.end()
    return chat


def read_completion(data: Json, options: ServeOptions, *, context: int) -> CompletionRequest:
    """Read the body of /v1/completions; see `read_chat`."""
    fields = Fields(data)
    count = fields.integer("logprobs", 0, MAX_TOP_LOGPROBS)
    completion = CompletionRequest(
        prompt=_prompt(fields), wanted=_wanted(fields, options, context, count, COMPLETION_TOKENS)
    )
    fields.only("echo", (False,), "the prompt is not repeated")
    fields.only("best_of", (1,), "one answer per request")
    fields.only("suffix", ("",), "the model cannot insert text")
    fields.end()
    return completion


def _wanted(
    fields: Fields,
    options: ServeOptions,
    context: int,
    logprobs: int | None,
    default_tokens: int | None = None,
) -> Wanted:
    stream = fields.flag("stream") or False
    wanted = Wanted(
        model=fields.text("model"),
        stream=stream,
        include_usage=_include_usage(fields, stream=stream),
        params=_params(fields, logprobs, _max_tokens(fields, options, context, default_tokens)),
    )
    _read_neutral(fields)
    return wanted


def _params(fields: Fields, logprobs: int | None, max_new_tokens: int) -> SamplingParams:
    given: dict[str, Json] = {
        "temperature": fields.number("temperature", 0, 100),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", 0, MAX_TOP_K),
        "min_p": fields.number("min_p", 0, 1),
        "repetition_penalty": fields.number("repetition_penalty", 0, 100),
        "seed": fields.integer("seed", MIN_SEED, MAX_SEED),
        "ignore_eos": fields.flag("ignore_eos"),
        "stop": _stop(fields),
    }
    if given["temperature"] is None:
        given["temperature"] = 1.0  # OpenAI's default
    if given["top_p"] == 0:
        given["top_p"] = SMALLEST_TOP_P
    if given["seed"] is not None:
        given["seed"] %= MAX_SEED + 1  # OpenAI allows negative ones
    found = {name: value for name, value in given.items() if value is not None}
    try:
        return SamplingParams(max_new_tokens=max_new_tokens, logprobs=logprobs, **found)
    except ConfigError as error:
        raise ApiError(error.message, param=error.message.partition(" ")[0]) from error


def _max_tokens(fields: Fields, options: ServeOptions, context: int, default: int | None) -> int:
    """Return how many tokens are wanted at most; the end of the context is an end, too."""
    most = options.max_new_tokens or context
    names = ("max_completion_tokens", "max_tokens")
    given = {name: fields.integer(name, 1, MAX_TOP_K) for name in names}
    found = {name: value for name, value in given.items() if value is not None}
    if len(set(found.values())) > 1:
        raise fields.error("max_tokens", "and max_completion_tokens differ; give one")
    for name, value in found.items():
        if options.max_new_tokens is not None and value > most:
            raise fields.error(name, f"is {value:,}, this server allows {most:,}")
        return min(value, context)
    return min(default or most, most)


def _include_usage(fields: Fields, *, stream: bool) -> bool:
    options = fields.object("stream_options")
    if options is None:
        return False
    if not stream:
        raise fields.error("stream_options", "needs stream to be true")
    include = options.flag("include_usage") or False
    options.only("include_obfuscation", (False,), "chunks are not padded")
    options.end()
    return include


def _stop(fields: Fields) -> list[str]:
    value = fields.get("stop")
    if isinstance(value, str):
        value = [value]
    elif value is not None:
        value = fields.items("stop", most=MAX_STOP_TEXTS)
    for text in value or []:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise fields.error(
                "stop", f"holds something else than texts of 1 to {MAX_STOP_CHARACTERS} characters"
            )
    return list(value or [])


def _thinking(fields: Fields, *, default: bool) -> bool:
    options = fields.object("chat_template_kwargs")
    if options is None:
        return default
    flag = options.flag("enable_thinking")
    option = options.choice("thinking_option", ("on", "off"))
    options.end()
    if option is not None and flag is not None and flag != (option == "on"):
        raise fields.error("chat_template_kwargs", "contradicts itself about thinking")
    if option is not None:
        return option == "on"
    return default if flag is None else flag


def _prompt(fields: Fields) -> str | list[int]:
    value = fields.get("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and set(map(type, value)) == {int}:
        return value
    raise fields.error("prompt", "must be a text or a list of token ids, and only one of them")


def _read_neutral(fields: Fields) -> None:
    """Read what changes no text, and refuse what would have to."""
    fields.only("n", (1,), "one answer per request; send several requests")
    for name in ("presence_penalty", "frequency_penalty"):
        fields.only(name, (0, 0.0), "use repetition_penalty")
    fields.only("logit_bias", ({},), "logits are not biased")
    fields.only("response_format", ({"type": "text"},), "output is not constrained")
    fields.only("store", (False,), "nothing is stored")
    fields.only("service_tier", ("auto", "default"), "there is one tier")
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        fields.text(name, most=1000)
    metadata = fields.get("metadata")
    if metadata is not None:
        Fields(metadata, "metadata")
