"""``ringexport run``: continue a prompt, or answer it as a chat."""

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from ringexport.cli.app import App, backend_option, command_options, json_option, pass_app
from ringexport.cli.run_batch import check_usage, run_batch
from ringexport.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ringexport.runtime.generation import GenerationResult, GenerationStream
    from ringexport.runtime.sampling import SamplingParams
    from ringexport.runtime.session import Engine

Function = TypeVar("Function", bound="Callable[..., object]")

__all__ = ["SAMPLING_DEFAULTS", "command"]

SAMPLING_DEFAULTS = {
    "max_new_tokens": "256",
    "temperature": "0.0",
    "top_k": "0",
    "top_p": "1.0",
    "min_p": "0.0",
    "repetition_penalty": "1.0",
}
"""What the help shows; the values come from `SamplingParams`, and a test compares the two."""

_MAX_COUNT = 2**31 - 1
_UTF8_HINT = "convert the prompt to UTF-8"
_STOP_REASONS = {
    "stop_token": "stop token",
    "stop_text": "stop text",
    "length": "--max-new-tokens reached",
    "context": "context full",
    "cancelled": "cancelled",
}


class _Number(click.FloatRange):
    """A number in a range; NaN and infinity, which every comparison lets through, are not."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse the text of an option."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number", param, ctx)
        return float(number)


def _stop_texts(
    context: click.Context, option: click.Parameter, values: tuple[str, ...]
) -> tuple[str, ...]:
    """Refuse an empty stop text, which is everywhere."""
    if "" in values:
        raise click.BadParameter("a stop text may not be empty", context, option)
    return values


def _sampling(
    name: str, kind: "click.ParamType[Any] | type", text: str
) -> "Callable[[Function], Function]":
    """Make an option of `SamplingParams`; left out, the dataclass decides."""
    flag = "--" + name.replace("_", "-")
    return click.option(
        flag,
        type=kind,
        default=None,
        metavar="N",
        help=f"{text}  [default: {SAMPLING_DEFAULTS[name]}]",
    )


@click.command("run")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option(
    "--input",
    "input_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='Continue many prompts, one JSON object a line: {"id": ..., "prompt": ...}.',
)
@click.option(
    "--output",
    "output_path",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where --input's results go, in the order in which they are ready; prompts whose id has"
    " one there already are skipped, even if they were changed.",
)
@click.option("--chat", is_flag=True, help="Put the prompt into the checkpoint's chat template.")
@click.option(
    "--thinking/--no-thinking",
    default=True,
    show_default=True,
    help="With --chat, let the model think before it answers.",
)
@_sampling("max_new_tokens", click.IntRange(0, _MAX_COUNT), "Stop after so many tokens.")
@_sampling("temperature", _Number(min=0), "Divide the logits by this; 0 is greedy.")
@_sampling("top_k", click.IntRange(0, _MAX_COUNT), "Keep the k most likely tokens; 0 keeps all.")
@_sampling(
    "top_p",
    _Number(0, 1, min_open=True),
    "Keep the most likely tokens up to this sum of probabilities.",
)
@_sampling("min_p", _Number(0, 1), "Keep tokens this likely, relative to the most likely.")
@_sampling(
    "repetition_penalty",
    _Number(min=0, min_open=True),
    "Make tokens that were seen less likely, above 1.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), metavar="N", help="The same seed gives the same text."
)
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    callback=_stop_texts,
    help="End at this text; repeatable.",
)
@backend_option
@click.option("--stream/--no-stream", default=True, help="Write the text as it is generated.")
@json_option
@command_options
@pass_app
def command(
    app: App,
    /,
    *,
    bundle: Path,
    prompt: str | None,
    input_path: Path | None,
    output_path: Path | None,
    chat: bool,
    thinking: bool,
    stop: tuple[str, ...],
    backend: str | None,
    stream: bool,
    as_json: bool,
    **sampling: float | None,
) -> None:
    """Continue PROMPT with the model of a BUNDLE; - or a pipe reads the prompt from stdin.

    The text goes to stdout, numbers about it to stderr. A CHECKPOINT works too, with the torch
    reference.

    With --input and --output the prompts of a file are continued together. A line has an "id", a
    "prompt" or "messages", and, where it needs its own, the options below by their names in Python:
    "max_new_tokens" and so on. The same command goes on after an interrupt.
    """
    from ringexport.cli.opening import open_engine

    check_usage(prompt, input_path, output_path)
    if input_path is not None and output_path is not None:
        run_batch(
            app,
            bundle,
            _params(stop, sampling),
            files=(input_path, output_path),
            backend=app.backend(backend),
            chat=chat,
            thinking=thinking,
            as_json=as_json,
        )
        return
    text = _read_prompt(prompt)
    params = _params(stop, sampling)
    terminal = app.terminal
    with terminal.progress(keep_lines=False) as progress:
        engine = open_engine(app, bundle, progress, backend=app.backend(backend))
    with engine:
        if chat:
            text = engine.chat_prompt([{"role": "user", "content": text}], thinking=thinking)
        elif not as_json:
            terminal.show_prompt(text)
        result = _generate(engine, text, params, show=stream and not as_json)
        if as_json:
            app.write_json({"backend": engine.runner.spec.name, **asdict(result)})
        elif not stream:
            sys.stdout.write(result.text + "\n")
    terminal.say(_statistics(engine.runner.spec.name, result), style="dim")


def _params(stop: tuple[str, ...], sampling: "Mapping[str, float | None]") -> "SamplingParams":
    """Return what the options ask for; left out, the dataclass decides."""
    from ringexport.runtime.sampling import SamplingParams

    given = {name: value for name, value in sampling.items() if value is not None}
    try:
        return SamplingParams(stop=stop, **given)  # type: ignore[arg-type]  # click checked types
    except ConfigError as error:
        hint = "ringexport run --help shows the ranges"
        raise ConfigError(error.message, hint=hint) from error


def _generate(
    engine: "Engine", text: str, params: "SamplingParams", *, show: bool
) -> "GenerationResult":
    stream: GenerationStream = engine.stream(text, params)
    wrote = False
    try:
        for piece in stream:
            if show and piece:
                wrote = True
                sys.stdout.write(piece)
                sys.stdout.flush()
    finally:
        if wrote:
            sys.stdout.write("\n")
            sys.stdout.flush()
    return stream.result


def _statistics(backend: str, result: "GenerationResult") -> str:
    timings = result.timings
    parts = [f"{result.prompt_tokens:,} prompt tokens", f"{result.new_tokens:,} new tokens"]
    if result.new_tokens:
        parts.append(f"first token {timings.time_to_first_token_ms:.1f} ms")
    if result.new_tokens > 1:
        parts.append(f"{timings.tokens_per_second:.1f} tokens/s")
    reason = _STOP_REASONS[result.stop_reason]
    if result.stop_text is not None:
        reason += f" {result.stop_text!r}"
    return f"[{backend}] {', '.join(parts)}, stopped by: {reason}"


def _read_prompt(argument: str | None) -> str:
    """Return the prompt: the argument, or stdin without the newline at its end."""
    stdin: TextIO | None = sys.stdin  # None if the caller has closed it
    if argument is None and (stdin is None or stdin.isatty()):
        raise click.UsageError("give a PROMPT, or - to read it from stdin")
    if argument is None or argument == "-":
        if stdin is None:
            raise click.UsageError("the prompt was to come from stdin, which is closed")
        data = stdin.buffer.read()
        try:
            text = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ConfigError("the prompt on stdin is not UTF-8 text", hint=_UTF8_HINT) from error
    else:
        text = argument
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError("the prompt is not UTF-8 text", hint=_UTF8_HINT) from error
    return text
