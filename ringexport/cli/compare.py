"""``ringexport compare``: a bundle against the reference or another bundle, from inside."""

import difflib
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringexport.cli.app import (
    App,
    bad_value,
    command_options,
    json_option,
    pass_app,
    verify_option,
)
from ringexport.errors import ConfigError

if TYPE_CHECKING:
    from ringexport.cli.console import Terminal
    from ringexport.compare.report import Comparison, Row
    from ringexport.runtime.session import Engine
    from ringexport.runtime.tokenizer import ModelTokenizer

__all__ = ["CompareConfig", "command"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """Defaults of the command.

    Attributes:
        tokens: how many tokens both models see.
    """

    tokens: int = 256


@click.command("compare")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--against",
    required=True,
    metavar="torch|BUNDLE",
    help="The reference: torch runs the checkpoint that the bundle was built from.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIRECTORY",
    help="Where that checkpoint is now, if it has moved.",
)
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="UTF-8 text to feed; default: a built-in page of prose and code.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    metavar="N",
    default=CompareConfig.__dataclass_fields__["tokens"].default,
    show_default=True,
    help="How many tokens of it.",
)
@verify_option
@json_option
@command_options
@pass_app
def command(
    app: App,
    bundle: Path,
    against: str,
    checkpoint: Path | None,
    text: Path | None,
    tokens: int,
    *,
    verify: bool,
    as_json: bool,
) -> None:
    """Compare a BUNDLE with the torch reference or another bundle, from inside.

    Both see the same tokens. Compared are the residual stream and the chosen experts of every
    layer, every state, and the logits of prefill and decode. Ends with exit code 1 if a number
    is out of its bound.
    """
    from ringexport.cli.opening import open_engine
    from ringexport.compare.teacher import compare_runners, require_probe

    _check_against(against)
    terminal = app.terminal
    with ExitStack() as stack:
        progress = stack.enter_context(terminal.progress())
        found = stack.enter_context(open_engine(app, bundle, progress, verify=verify))
        if against == "torch":
            other = open_engine(
                app, bundle, progress, backend="torch", checkpoint=checkpoint, verify=False
            )
        else:
            other = open_engine(app, Path(against), progress, verify=verify)
        expected = stack.enter_context(other)
        limit = min(engine.runner.spec.context_length for engine in (found, expected))
        if tokens > limit:
            raise bad_value("--tokens", f"{tokens} is more than the context, expected 2 to {limit}")
        sides = ((str(bundle), found), (against, expected))
        warning = _decay_warning(*sides) or _quantization_warning(*sides)
        ids = _tokens(found.tokenizer, text, tokens)
        result = compare_runners(
            require_probe(found.runner), require_probe(expected.runner), ids, progress=progress
        )
    if as_json:
        app.write_json({"warning": warning, **result.to_dict()})
    else:
        if warning:
            terminal.result(warning)
        _show(terminal, result)
    if not result.passed:
        result.check()


def _check_against(name: str) -> None:
    """Refuse a word that is neither torch nor a path, before anything is loaded."""
    if name == "torch" or Path(name).exists():
        return
    near = difflib.get_close_matches(name.lower(), ["torch"], n=1)
    guess = "; did you mean torch?" if near else ""
    raise bad_value("--against", f"there is no bundle at {name}{guess}")


def _decay_warning(*sides: "tuple[str, Engine]") -> str | None:
    """Return a sentence if the models decay in different ways: they cannot agree then."""
    forms = [
        f"{name} with {engine.bundle.manifest.build.decay_index}"
        for name, engine in sides
        if engine.bundle is not None
    ]
    if len({form.rpartition(" ")[2] for form in forms}) < 2:
        return None
    return f"built with different decay indices, so nothing will agree: {', '.join(forms)}"


def _quantization_warning(*sides: "tuple[str, Engine]") -> str | None:
    """Return a sentence if one side is quantized: the bounds are those of equal weights."""
    quantized = [
        f"{name} (recipe {engine.bundle.manifest.build.recipe})"
        for name, engine in sides
        if engine.bundle is not None
        and engine.bundle.manifest.quantization is not None
        and engine.runner.spec.name != "torch"
    ]
    if not quantized:
        return None
    return (
        f"quantized, so the bounds for equal weights will not hold: {', '.join(quantized)}; "
        "ringexport eval --against measures the loss"
    )


def _tokens(tokenizer: "ModelTokenizer", path: Path | None, count: int) -> list[int]:
    """Return `count` tokens of the text, which is repeated if it is the built-in one."""
    from ringexport.cli.opening import read_text
    from ringexport.compare.sample import SAMPLE_TEXT

    if path is not None:
        ids = tokenizer.encode(read_text(path))
        if len(ids) < 2:
            raise ConfigError(f"{path} has {len(ids)} tokens, expected at least 2")
        return ids[:count]
    ids = tokenizer.encode(SAMPLE_TEXT)
    return (ids * math.ceil(count / len(ids)))[:count]


def _show(terminal: "Terminal", result: "Comparison") -> None:
    columns = ("what", "where", "number", "value", "bound", "verdict")
    rows = [
        [row.kind, row.name, row.metric, _value(row), row.bound or "", _verdict(row)]
        for row in result.rows
    ]
    title = f"{result.found} against {result.expected}, {result.tokens} tokens"
    terminal.table(columns, rows, title=title, right=(3,), whole=(0, 1))
    notes = {row.note for row in result.rows if row.note}
    for note in sorted(notes):
        terminal.result(note)
    bounded = sum(row.passed is not None for row in result.rows)
    verdict = "all" if result.passed else f"{bounded - len(result.failures)} of"
    terminal.result(f"\n{verdict} {bounded} bounds hold")


def _value(row: "Row") -> str:
    if row.kind == "experts" or row.name.endswith("top-1"):
        return f"{100 * row.value:.2f}%"
    if row.name.endswith("cosine"):
        return f"{row.value:.9f}"
    return f"{row.value:.2e}"


def _verdict(row: "Row") -> str:
    return {True: "ok", False: "FAIL", None: ""}[row.passed]
