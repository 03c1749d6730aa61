"""``ringexport bench``: first-token time and decode speed of the backends, side by side."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ringexport.cli.app import App, command_options, json_option, pass_app
from ringexport.errors import BackendUnavailableError, CheckpointError
from ringexport.pipeline.request import AUTO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringexport.cli.console import Terminal
    from ringexport.compare.speed import Speed
    from ringexport.progress import Progress
    from ringexport.runtime.runner import Runner

__all__ = ["command"]

BUSY_SPREAD = 0.25
"""Runs on a machine that does nothing else differ by a few percent."""


class _Numbers(click.ParamType[Any]):
    """Whole numbers above 0, separated by commas."""

    name = "N,N,.."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse the text of an option; a default is a tuple already."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isascii() and part.isdigit() and 0 < int(part) < 10**9 for part in parts):
            self.fail(f"{value!r} is no list of whole numbers above 0, such as 1,8,64", param, ctx)
        return tuple(int(part) for part in parts)


_DEFAULTS = {"batch": "1", "prefill": "128,2000", "context": 128, "decode": 64, "repeat": 3}
"""As in `ringexport.compare.speed.BenchConfig`, which imports numpy; a test compares them."""


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--batch",
    type=_Numbers(),
    default=_DEFAULTS["batch"],
    show_default=True,
    help="Rows that are decoded together.",
)
@click.option(
    "--prefill",
    type=_Numbers(),
    default=_DEFAULTS["prefill"],
    show_default=True,
    help="Prompt lengths in tokens whose first-token time is measured.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    default=_DEFAULTS["context"],
    show_default=True,
    help="Tokens in the state before decoding.",
)
@click.option(
    "--decode",
    type=click.IntRange(min=1),
    metavar="N",
    default=_DEFAULTS["decode"],
    show_default=True,
    help="Tokens that are decoded per run.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    metavar="N",
    default=_DEFAULTS["repeat"],
    show_default=True,
    help="Runs of which the median counts, after one that warms up.",
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="NAME",
    help="Backends to measure; default: every target of the bundle that runs here, and torch.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    metavar="DIRECTORY",
    help="Checkpoint for the torch backend, if it has moved since the build.",
)
@json_option
@command_options
@pass_app
def command(
    app: App,
    /,
    *,
    bundle: Path,
    batch: tuple[int, ...],
    prefill: tuple[int, ...],
    context: int,
    decode: int,
    repeat: int,
    backends: tuple[str, ...],
    checkpoint: Path | None,
    as_json: bool,
) -> None:
    """Measure first-token time and decode speed of a BUNDLE, backend by backend.

    The backends first decode a text greedily; if they disagree, no speed is reported and the exit
    code is 1. Compare numbers only from machines that do nothing else.
    """
    from ringexport.compare.conditions import measurement_conditions
    from ringexport.compare.speed import BenchConfig, check_agreement, measure

    config = BenchConfig(
        batch=batch, prefill=prefill, context=context, decode=decode, repeat=repeat
    )
    terminal = app.terminal
    conditions = {"bundle": str(bundle)} | measurement_conditions(app.settings.threads)
    with ExitStack() as stack:
        progress = stack.enter_context(terminal.progress())
        if not backends and app.settings.backend != AUTO:
            backends = (app.settings.backend,)
        runners, skipped = _open_runners(app, stack, progress, bundle, backends, checkpoint)
        config.check(min(runner.spec.context_length for runner in runners))
        progress.start("checking that the backends agree")
        agreed = check_agreement(runners)
        progress.finish()
        speeds = [measure(runner, config, progress=progress) for runner in runners]
    if as_json:
        app.write_json(
            {
                "conditions": conditions,
                "agreed_greedy_tokens": agreed if len(runners) > 1 else None,
                "context": context,
                "results": [speed.to_dict() for speed in speeds],
                "skipped": skipped,
            }
        )
        return
    terminal.facts(conditions)
    for name, reason in skipped.items():
        terminal.result(f"not measured: {name}: {reason}")
    _show(terminal, speeds, context)
    if any(speed.spread > BUSY_SPREAD for speed in speeds):
        terminal.result(
            "\nthe decode runs differ a lot: something else kept the machine busy, measure again"
        )
    if len(runners) > 1:
        terminal.result(f"\nchecked: the same {agreed} greedy tokens from all backends")


def _open_runners(
    app: App,
    stack: ExitStack,
    progress: "Progress",
    path: Path,
    backends: tuple[str, ...],
    checkpoint: Path | None,
) -> tuple[list["Runner"], dict[str, str]]:
    """Open the backends that were asked for, or all that can run."""
    from ringexport.bundle import EngineBundle
    from ringexport.runtime.registry import RunnerOptions, open_bundle_runner

    bundle = EngineBundle.open(path, progress=progress)
    options = RunnerOptions(threads=app.settings.threads, checkpoint=checkpoint)
    runners: list[Runner] = []
    skipped: dict[str, str] = {}
    for name in dict.fromkeys(backends or (*bundle.targets, "torch")):
        progress.start(f"loading {name}")
        try:
            runner = open_bundle_runner(bundle, name, options)
        except (BackendUnavailableError, CheckpointError) as error:
            if backends:
                raise
            skipped[name] = error.message
            continue
        finally:
            progress.finish()
        stack.callback(runner.close)
        runners.append(runner)
    if not runners:
        raise BackendUnavailableError(
            f"no backend can run {path} here: {'; '.join(skipped.values())}",
            hint="ringexport doctor tells what is missing",
        )
    return runners, skipped


def _show(terminal: "Terminal", speeds: "Sequence[Speed]", context: int) -> None:
    """Write one row per measurement, one column per backend, and the ratio of the ends."""
    first, last = speeds[0], speeds[-1]
    columns = ["measured", *(speed.name for speed in speeds)]
    rows = []
    for length in first.first_token_ms:
        row = [f"first token, prompt of {length:,} tokens"]
        row += [f"{speed.first_token_ms[length]:.1f} ms" for speed in speeds]
        row.append(f"{last.first_token_ms[length] / first.first_token_ms[length]:.1f}x")
        rows.append(row)
    for batch in first.decode_tokens_per_s:
        row = [f"decode after {context:,} tokens, batch {batch}"]
        row += [f"{speed.decode_tokens_per_s[batch]:.1f} tokens/s" for speed in speeds]
        row.append(f"{first.decode_tokens_per_s[batch] / last.decode_tokens_per_s[batch]:.1f}x")
        rows.append(row)
    rows.append(
        ["spread of the decode runs", *(f"{100 * speed.spread:.0f}%" for speed in speeds), ""]
    )
    if len(speeds) > 1:
        columns.append(f"{first.name} is faster by")
    else:
        rows = [row[:-1] for row in rows]
    terminal.table(columns, rows, title="Speed", right=tuple(range(1, len(columns))))
