"""``ringexport run --input``: continue the prompts of a file, and go on after an interrupt."""

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ringexport.cli.app import App
from ringexport.errors import ConfigError

if TYPE_CHECKING:
    from ringexport.runtime.sampling import SamplingParams

__all__ = ["check_usage", "run_batch"]


def check_usage(prompt: str | None, input_path: Path | None, output_path: Path | None) -> None:
    """Refuse options that contradict each other.

    Raises:
        UsageError: one of the files without the other, a prompt besides, or the same file twice.
    """
    if (input_path is None) != (output_path is None):
        raise click.UsageError("--input and --output belong together")
    if input_path is not None and prompt is not None:
        raise click.UsageError("give a PROMPT or --input, not both")
    if input_path is not None and output_path is not None and _same_file(input_path, output_path):
        raise click.UsageError("--input and --output are the same file")


def run_batch(
    app: App,
    bundle: Path,
    params: "SamplingParams",
    *,
    files: tuple[Path, Path],
    backend: str,
    chat: bool,
    thinking: bool,
    as_json: bool,
) -> None:
    """Continue all prompts of a file that have no result yet.

    Args:
        app: of the command.
        bundle: what to open.
        params: for what a line does not say.
        files: input and output.
        backend: name of a backend.
        chat, thinking: as the options of the command.
        as_json: write the summary to stdout.

    Raises:
        ConfigError: bad lines, before anything is loaded; or prompts that failed, in this run or
            an earlier one, at the end.
        RingExportError: whatever is wrong with the bundle or the files.
    """
    from ringexport.batching.jsonl import ResultFile, read_prompts
    from ringexport.batching.offline import OfflineRun
    from ringexport.cli.opening import open_engine

    source, target = files
    ids = [line.id for line in read_prompts(source, params)]
    with ResultFile(target, ids) as results, app.terminal.progress() as progress:
        skipped = len(results.finished)
        engine = open_engine(app, bundle, progress, backend=backend)
        with engine:
            run = OfflineRun(engine, results, progress)
            start = time.perf_counter()
            progress.start("continuing prompts", len(ids) - skipped, "prompts")
            run.run(read_prompts(source, params), chat=chat, thinking=thinking)
            progress.finish()
            seconds = time.perf_counter() - start
    new = len(ids) - skipped
    failed = len(results.failed)  # those of earlier runs too: nobody else may have seen them
    counts = {"prompts": len(ids), "skipped": skipped, "failed": failed}
    tokens = {"prompt_tokens": run.prompt_tokens, "new_tokens": run.new_tokens}
    if as_json:
        app.write_json(counts | tokens | {"seconds": seconds})
    app.terminal.say(
        f"[{engine.runner.spec.name}] {new:,} prompts, {skipped:,} had results before,"
        f" {run.prompt_tokens:,} prompt tokens, {run.new_tokens:,} new tokens,"
        f" {run.new_tokens / max(seconds, 1e-9):,.1f} tokens/s",
        style="dim",
    )
    if failed:
        raise ConfigError(
            f"{failed:,} of {len(ids):,} prompts failed",
            hint=f'the lines of {target} that have an "error" say why; delete them to try again',
        )


def _same_file(one: Path, other: Path) -> bool:
    """Tell whether two paths lead to one file; hard links do."""
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return one.resolve() == other.resolve()
