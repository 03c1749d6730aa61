"""``ringexport bench``: first-token time and decode speed of the backends, side by side."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ringexport.cli.app import (
    App,
    bad_value,
    command_options,
    json_option,
    pass_app,
    verify_option,
)
from ringexport.errors import BackendUnavailableError, CheckpointError
from ringexport.pipeline.request import AUTO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ringexport.cli.console import Terminal
    from ringexport.compare.speed import BenchConfig, Speed
    from ringexport.progress import Progress
    from ringexport.runtime.runner import Runner

__all__ = ["command"]

BUSY_SPREAD = 0.25
"""Runs on a machine that does nothing else differ by a few percent."""


class _Numbers(click.ParamType[Any]):
    """Whole numbers from 1 to `most`, separated by commas."""

    name = "N,N,.."

    def __init__(self, most: int) -> None:
        self._most = most

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parse the text of an option; a default is a tuple already."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isascii() and part.isdigit() and len(part) < 19 for part in parts):
            self.fail(f"{value!r} is no list of whole numbers, such as 1,8,64", param, ctx)
        numbers = tuple(int(part) for part in parts)
        if not all(1 <= number <= self._most for number in numbers):
            self.fail(f"{value!r} is not in the range 1 to {self._most:,}", param, ctx)
        return tuple(dict.fromkeys(numbers))


_CUDA = "cuda:"
_MAX_ROWS = 1024
_MAX_TOKENS = 1 << 24
_MAX_REPEAT = 1000
_DEFAULTS = {"batch": "1", "prefill": "128,2000", "context": "128", "decode": 64, "repeat": 3}
"""As in `ringexport.compare.speed.BenchConfig`, which imports numpy; a test compares them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """What is measured: a bundle, the backends asked for, and how they are opened."""

    bundle: Path
    backends: tuple[str, ...]
    checkpoint: Path | None
    verify: bool


@click.command("bench")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--random-weights",
    type=click.Path(path_type=Path),
    metavar="CONFIG.json",
    help="Measure the fast engine with random weights of this config instead of a BUNDLE.",
)
@click.option(
    "--recipe",
    metavar="NAME|FILE.toml",
    help="Number formats of random weights.  [default: fp8]",
)
@click.option(
    "--profile", is_flag=True, help="Show the kernels of a decode step of the fast engine."
)
@click.option(
    "--batch",
    type=_Numbers(_MAX_ROWS),
    default=_DEFAULTS["batch"],
    show_default=True,
    help=f"Rows that are decoded together, up to {_MAX_ROWS}.",
)
@click.option(
    "--prefill",
    type=_Numbers(_MAX_TOKENS),
    default=_DEFAULTS["prefill"],
    show_default=True,
    help="Prompt lengths in tokens whose first-token time is measured; by the fast engine with "
    "each number of rows.",
)
@click.option(
    "--context",
    type=_Numbers(_MAX_TOKENS),
    default=_DEFAULTS["context"],
    show_default=True,
    help="Tokens in the state before decoding; each number is measured.",
)
@click.option(
    "--decode",
    type=click.IntRange(1, _MAX_TOKENS),
    metavar="N",
    default=_DEFAULTS["decode"],
    show_default=True,
    help="Tokens that are decoded per run.",
)
@click.option(
    "--repeat",
    type=click.IntRange(1, _MAX_REPEAT),
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
@verify_option
@json_option
@command_options
@pass_app
def command(
    app: App,
    /,
    *,
    bundle: Path | None,
    random_weights: Path | None,
    recipe: str | None,
    profile: bool,
    batch: tuple[int, ...],
    prefill: tuple[int, ...],
    context: tuple[int, ...],
    decode: int,
    repeat: int,
    backends: tuple[str, ...],
    checkpoint: Path | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Measure first-token time and decode speed of a BUNDLE, backend by backend.

    The backends first decode a text greedily; if they disagree, no speed is reported and the exit
    code is 1. Compare numbers only from machines that do nothing else.

    With --random-weights, or a cuda backend alone, the fast engine is measured in detail: a step's
    time on the GPU, the bytes that it moves, the limit at the read rate of this GPU, and the time
    of each kind of layer. Its logits are first compared with a reference over the same weights;
    if they differ by more than bf16 explains, or too few experts are hit, no speed is reported.
    """
    from ringexport.compare.speed import BenchConfig

    config = BenchConfig(
        batch=batch, prefill=prefill, context=context, decode=decode, repeat=repeat
    )
    if (bundle is None) == (random_weights is None):
        raise click.UsageError("give either a BUNDLE or --random-weights CONFIG.json")
    if random_weights is not None:
        _refuse_options_of_bundles(backends, checkpoint)
        from ringexport.cli.bench_gpu import bench_random_weights

        bench_random_weights(
            app, random_weights, recipe or "fp8", config, profile=profile, as_json=as_json
        )
        return
    assert bundle is not None
    if recipe is not None:
        raise bad_value("--recipe", "a bundle has its own recipe; give --random-weights")
    choice = _Choice(bundle=bundle, backends=backends, checkpoint=checkpoint, verify=verify)
    if backends and all(name.startswith(_CUDA) for name in backends):
        from ringexport.cli.bench_gpu import bench_bundle

        bench_bundle(
            app, bundle, backends[0], config, verify=verify, profile=profile, as_json=as_json
        )
        return
    if profile:
        raise bad_value(
            "--profile",
            "only the fast engine shows its kernels; give --random-weights, or none but a cuda"
            " --backend",
        )
    _bench_backends(app, choice, config, as_json=as_json)


def _refuse_options_of_bundles(backends: tuple[str, ...], checkpoint: Path | None) -> None:
    for option, value in (("--backend", backends), ("--checkpoint", checkpoint)):
        if value:
            raise bad_value(option, "random weights are run by the fast engine alone")


def _bench_backends(app: App, choice: _Choice, config: "BenchConfig", *, as_json: bool) -> None:
    """Measure the backends of a bundle side by side."""
    from ringexport.compare.conditions import measurement_conditions
    from ringexport.compare.speed import check_agreement, measure

    terminal = app.terminal
    conditions = {"bundle": str(choice.bundle)} | measurement_conditions(app.settings.threads)
    with ExitStack() as stack:
        progress = stack.enter_context(terminal.progress())
        runners, skipped = _open_runners(app, stack, progress, choice, config)
        _check_lengths(config, min(runner.spec.context_length for runner in runners))
        progress.start("checking that the backends agree")
        agreed = check_agreement(runners)
        progress.finish()
        speeds = [measure(runner, config, progress=progress) for runner in runners]
    if as_json:
        app.write_json(
            {
                "conditions": conditions,
                "agreed_greedy_tokens": agreed if len(runners) > 1 else None,
                "context": list(config.context),
                "results": [speed.to_dict() for speed in speeds],
                "skipped": skipped,
            }
        )
        return
    terminal.facts(conditions)
    for name, reason in skipped.items():
        terminal.result(f"not measured: {name}: {reason}")
    _show(terminal, speeds)
    if any(speed.spread > BUSY_SPREAD for speed in speeds):
        terminal.result(
            "\nthe decode runs differ a lot: something else kept the machine busy, measure again"
        )
    if len(runners) > 1:
        terminal.result(f"\nchecked: the same {agreed} greedy tokens from all backends")


def _check_lengths(config: "BenchConfig", limit: int) -> None:
    """Refuse lengths that the context does not hold, by the names of their options."""
    if max(config.prefill) > limit:
        raise bad_value(
            "--prefill", f"{max(config.prefill)} is more than the context, which holds {limit}"
        )
    longest = max(config.context) + config.decode
    if longest > limit:
        larger, other = "--context", "--decode"
        if config.decode > max(config.context):
            larger, other = other, larger
        raise bad_value(
            larger, f"with {other} it makes {longest} tokens, the context holds {limit}"
        )


def _open_runners(
    app: App,
    stack: ExitStack,
    progress: "Progress",
    choice: _Choice,
    config: "BenchConfig",
) -> tuple[list["Runner"], dict[str, str]]:
    """Open the backends that were asked for, or all that can run."""
    from ringexport.bundle import EngineBundle
    from ringexport.cli.opening import open_runner
    from ringexport.compare.speed import AGREEMENT_TOKENS
    from ringexport.runtime.registry import RunnerOptions

    bundle = EngineBundle.open(choice.bundle, verify=choice.verify, progress=progress)
    _check_lengths(config, bundle.manifest.model.context_length)
    options = RunnerOptions(
        threads=app.settings.threads,
        checkpoint=choice.checkpoint,
        kernel_library=app.settings.kernel_library,
        max_batch=max(config.batch),
        max_context=max(config.longest, AGREEMENT_TOKENS),
    )
    backends = choice.backends
    if not backends and app.settings.backend != AUTO:
        backends = (app.settings.backend,)
    runners: list[Runner] = []
    skipped: dict[str, str] = {}
    for name in dict.fromkeys(backends or (*bundle.targets, "torch")):
        progress.start(f"loading {name}")
        try:
            runner = open_runner(bundle, name, options)
        except (BackendUnavailableError, CheckpointError) as error:
            if backends:
                raise
            skipped[name] = error.message
            progress.note(f"{name} is not measured: {error.message}")
            continue
        finally:
            progress.finish()
        stack.callback(runner.close)
        runners.append(runner)
    if not runners:
        raise BackendUnavailableError(
            f"no backend can run {choice.bundle} here: {'; '.join(skipped.values())}",
            hint="ringexport doctor tells what is missing",
        )
    return runners, skipped


def _show(terminal: "Terminal", speeds: "Sequence[Speed]") -> None:
    """Write one row per measurement, one column per backend, and the ratio of the ends."""
    first, last = speeds[0], speeds[-1]
    columns = ["measured", *(speed.name for speed in speeds)]
    rows = []
    for length in first.first_token_ms:
        row = [f"first token, prompt of {length:,} tokens"]
        row += [f"{speed.first_token_ms[length]:.1f} ms" for speed in speeds]
        row.append(f"{last.first_token_ms[length] / first.first_token_ms[length]:.1f}x")
        rows.append(row)
    for context, batches in first.decode_tokens_per_s.items():
        for batch in batches:
            found = [speed.decode_tokens_per_s[context][batch] for speed in speeds]
            row = [f"decode after {context:,} tokens, batch {batch}"]
            row += [f"{value:.1f} tokens/s" for value in found]
            rows.append([*row, f"{found[0] / found[-1]:.1f}x"])
    rows.append(
        ["spread of the decode runs", *(f"{100 * speed.spread:.0f}%" for speed in speeds), ""]
    )
    if len(speeds) > 1:
        columns.append(f"{first.name} is faster by")
    else:
        rows = [row[:-1] for row in rows]
    terminal.table(columns, rows, title="Speed", right=tuple(range(1, len(columns))))
