"""Open what the user names: a bundle or a checkpoint becomes an engine, a file a text."""

import stat
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from ringexport.bundle import MANIFEST_NAME, EngineBundle
from ringexport.cli.app import App
from ringexport.compare.perplexity import Text
from ringexport.errors import CheckpointError, ConfigError, DigestError
from ringexport.ops.decay_index import DecayIndex
from ringexport.progress import Progress
from ringexport.runtime.registry import (
    RunnerOptions,
    open_bundle_runner,
    open_checkpoint_runner,
)
from ringexport.runtime.runner import Runner
from ringexport.runtime.session import Engine
from ringexport.runtime.tokenizer import ModelTokenizer

__all__ = ["open_engine", "open_runner", "read_text", "texts_from_files"]

_MAX_TEXT_BYTES = 1 << 30


def open_engine(
    app: App,
    path: Path,
    progress: Progress,
    *,
    backend: str = "auto",
    decay_index: str | None = None,
    checkpoint: Path | None = None,
    verify: bool = True,
    max_batch: int | None = None,
    max_context: int | None = None,
) -> Engine:
    """Load a bundle or a checkpoint.

    Args:
        app: knows the number of threads.
        path: directory of a bundle or a checkpoint.
        progress: told about the bytes that are verified.
        backend: name of a backend, or "auto".
        decay_index: for a checkpoint; a bundle knows its own.
        checkpoint: where the torch backend finds a bundle's checkpoint, if it has moved.
        verify: compare the digests of a bundle.
        max_batch: sequences that a GPU has memory for, None for a few.
        max_context: tokens of each, None for the model's context.

    Raises:
        ConfigError: a decay index for a bundle.
        RingExportError: whatever is wrong with the directory.
    """
    is_checkpoint = (path / "config.json").is_file() and not (path / MANIFEST_NAME).is_file()
    options = RunnerOptions(
        threads=app.settings.threads,
        checkpoint=checkpoint,
        decay_index=DecayIndex(decay_index or "serving"),
        kernel_library=app.settings.kernel_library,
        max_context=max_context,
    )
    if max_batch is not None:
        options = replace(options, max_batch=max_batch)
    bundle = None
    directory = path
    if not is_checkpoint:
        bundle = EngineBundle.open(path, verify=verify, progress=progress)
        directory = path / "model"
        if decay_index is not None:
            raise ConfigError(
                f"{path} is a bundle and was built with the decay index"
                f" {bundle.manifest.build.decay_index}",
                hint="give --decay-index with a checkpoint, or build with it",
            )
    progress.start(f"loading the {'checkpoint' if bundle is None else 'bundle'}")
    with ExitStack() as stack:
        if bundle is None:
            runner = open_checkpoint_runner(path, backend, options)
        else:
            runner = open_runner(bundle, backend, options)
        stack.callback(runner.close)
        tokenizer = ModelTokenizer.open(directory, vocab_size=runner.spec.vocab_size)
        stack.pop_all()
    progress.finish()
    return Engine(runner, tokenizer, bundle=bundle)


def open_runner(bundle: EngineBundle, backend: str, options: RunnerOptions) -> Runner:
    """Load a bundle's model; a checkpoint that the user gave and that is another one is named.

    Raises:
        RingExportError: as `open_bundle_runner`.
    """
    try:
        return open_bundle_runner(bundle, backend, options)
    except (CheckpointError, DigestError) as error:
        if options.checkpoint is None:
            raise
        raise type(error)(
            f"{options.checkpoint} is not the checkpoint that the bundle was built from:"
            f" {error.message}",
            hint="give the directory that it was built from with --checkpoint",
        ) from error


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        ConfigError: it is no regular file, too large for a text, unreadable or not UTF-8.
    """
    try:
        _check_text_file(path)
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}",
            hint="convert it to UTF-8",
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"cannot read {path}: {reason}") from error


def _check_text_file(path: Path) -> None:
    """Refuse what would never end, or would not fit into memory."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        kind = "a directory" if stat.S_ISDIR(found.st_mode) else "not a regular file"
        raise ConfigError(f"cannot read {path}: it is {kind}", hint="give a text file")
    if found.st_size > _MAX_TEXT_BYTES:
        raise ConfigError(
            f"{path} has {found.st_size:,} bytes, expected at most {_MAX_TEXT_BYTES:,}",
            hint="give a part of it",
        )


def texts_from_files(
    tokenizer: ModelTokenizer, paths: Sequence[Path], max_tokens: int | None
) -> list[Text]:
    """Read and tokenize files.

    Args:
        tokenizer: of the model.
        paths: of UTF-8 texts.
        max_tokens: cut each text after so many tokens.

    Raises:
        ConfigError: a file that cannot be read, or has less than two tokens.
    """
    texts = [Text.encode(tokenizer, str(path), read_text(path), max_tokens) for path in paths]
    for text in texts:
        if len(text.tokens) < 2:
            raise ConfigError(
                f"there is nothing to score in {text.name}: it has {len(text.tokens)} tokens,"
                " expected at least 2",
                hint="give a longer --text",
            )
    return texts
