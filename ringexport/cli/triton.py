"""``ringexport triton``: a bundle becomes a model repository of Triton Inference Server."""

import shlex
from pathlib import Path

import click

from ringexport.cli.app import (
    App,
    backend_option,
    bad_value,
    command_options,
    json_option,
    pass_app,
)

__all__ = ["command"]


@click.command("triton")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="REPOSITORY",
    required=True,
    type=click.Path(path_type=Path),
    help="Directory to write; it appears when it is complete.",
)
@click.option("--name", metavar="NAME", help="Name of the model; default: that of the directory.")
@click.option(
    "--reference",
    is_flag=True,
    help="Name the bundle by its absolute path instead of copying it into the repository.",
)
@backend_option
@click.option(
    "--instances",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Processes that each load the model, per GPU if there are GPUs.",
)
@click.option("--gpus", metavar="LIST", help="Numbers of GPUs, such as 0,1: instances on each.")
@click.option(
    "--max-batch",
    type=click.IntRange(1, 128),
    default=32,
    show_default=True,
    help="Requests that an instance runs at once.",
)
@click.option(
    "--max-sessions",
    type=click.IntRange(0, 1_000_000),
    default=256,
    show_default=True,
    help="Sessions that an instance keeps by correlation id; 0 for none.",
)
@click.option(
    "--session-idle",
    type=click.IntRange(1, 30 * 24 * 3600),
    default=600,
    show_default=True,
    help="Seconds after which an idle session is forgotten.",
)
@click.option(
    "--plan-context",
    type=click.IntRange(1),
    help="Tokens of a sequence of the TensorRT step model; default: the engine's, at most 4096.",
)
@click.option("--force", is_flag=True, help="Replace a repository that this command wrote.")
@json_option
@command_options
@pass_app
def command(
    app: App,
    bundle: Path,
    output: Path,
    *,
    name: str | None,
    reference: bool,
    backend: str | None,
    instances: int,
    gpus: str | None,
    max_batch: int,
    max_sessions: int,
    session_idle: int,
    plan_context: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write a model repository for Triton Inference Server from a BUNDLE.

    The repository holds a model that streams texts and keeps sessions, a README with the command
    that starts the server, and a client. A bundle with TensorRT engines gets a second model that
    runs single steps of them.
    """
    from ringexport.bundle import EngineBundle
    from ringexport.triton import TritonOptions, write_repository

    options = TritonOptions(
        name=name,
        reference=reference,
        backend=app.backend(backend),
        threads=app.settings.threads,
        instances=instances,
        gpus=_numbers(gpus),
        max_batch=max_batch,
        max_sessions=max_sessions,
        session_idle_seconds=session_idle,
        plan_context=plan_context,
    )
    terminal = app.terminal
    with terminal.progress() as progress:
        opened = EngineBundle.open(bundle, progress=progress)
        written = write_repository(opened, output, options, overwrite=force, progress=progress)
    if as_json:
        app.write_json(
            {
                "repository": str(written.path),
                "models": list(written.models),
                "bytes": written.nbytes,
                "notes": list(written.notes),
                "command": list(written.command),
            }
        )
        return
    from ringexport.cli.console import format_bytes

    models = ", ".join(written.models)
    terminal.say(f"wrote {written.path}: {format_bytes(written.nbytes)}, models: {models}")
    for note in written.notes:
        terminal.say(f"note: {note}")
    terminal.say(f"start it: {shlex.join(written.command)}")


def _numbers(text: str | None) -> tuple[int, ...]:
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if any(not (word.isascii() and word.isdigit() and len(word) < 4) for word in words):
        raise bad_value("--gpus", f"{text!r:.80} is no list of numbers such as 0,1")
    return tuple(int(word) for word in words)
