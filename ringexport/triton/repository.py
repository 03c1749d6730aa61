"""Write a model repository so that the destination holds either the old one or the new one."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ringexport.bundle import MANIFEST_NAME, EngineBundle
from ringexport.bundle.files import (
    check_place,
    exchange_directories,
    remove_tree,
    sync_path,
    walk_files,
)
from ringexport.errors import BackendUnavailableError, OutputError
from ringexport.progress import NoProgress, Progress
from ringexport.runtime.registry import backend_choices
from ringexport.triton.options import TritonOptions, model_name
from ringexport.triton.pages import client_source, model_source, readme
from ringexport.triton.plan_config import PlanModel, find_plan_model, plan_config
from ringexport.triton.streaming_config import COPIED_BUNDLE, streaming_config
from ringexport.version import __version__

__all__ = ["INDEX_NAME", "WrittenRepository", "write_repository"]

INDEX_NAME = "ringexport-triton.json"
"""At the root of a repository: says that ringexport wrote it, from what, and which files."""

FORMAT = "ringexport-triton"
FORMAT_VERSION = 1
STEP_SUFFIX = "_step"
_COPY_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenRepository:
    """A finished repository.

    Attributes:
        path: where it is.
        models: names of its models.
        nbytes: size of its files.
        notes: what was left out, and why.
        command: what starts a server with it, as a list of arguments.
    """

    path: Path
    models: tuple[str, ...]
    nbytes: int
    notes: tuple[str, ...]
    command: tuple[str, ...]


def write_repository(
    bundle: EngineBundle,
    destination: Path,
    options: TritonOptions,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> WrittenRepository:
    """Write the model repository of a bundle.

    Args:
        bundle: an opened bundle.
        destination: a directory that is missing, empty, or a repository of ringexport.
        options: what it is to look like.
        overwrite: replace a repository of ringexport.
        progress: told about the bytes that are copied.

    Raises:
        OutputError: the destination cannot be written, holds something else, or may not be
            replaced; it is as it was before.
        ConfigError, BundleError, BackendUnavailableError: the options do not fit the bundle.
    """
    destination = Path(os.path.abspath(destination))  # noqa: PTH100 (keeps links)
    _check_destination(destination, overwrite=overwrite)
    _check_backend(bundle, options.backend)
    name = options.name or model_name(bundle.directory.resolve().name)
    plan = find_plan_model(bundle, options)
    models = [name]
    notes = []
    if isinstance(plan, str):
        notes.append(f"the model {name}{STEP_SUFFIX} for TensorRT was left out: {plan}")
    else:
        models.append(name + STEP_SUFFIX)
    command = _command(destination, name, plan)
    temporary = destination.with_name(f"{destination.name}.tmp-{uuid.uuid4().hex[:12]}")
    with _translated(destination):
        try:
            temporary.mkdir(parents=True)
            _write_streaming(bundle, temporary / name, options, progress or NoProgress())
            if isinstance(plan, PlanModel):
                _write_plan(bundle, temporary / (name + STEP_SUFFIX), plan, options)
            page = readme(bundle, name, options, plan=plan, command=command)
            (temporary / "README.md").write_text(page, encoding="utf-8")
            (temporary / "client.py").write_text(client_source(name), encoding="utf-8")
            _write_index(bundle, temporary, options)
            nbytes = _sync(temporary)
            _publish(temporary, destination, overwrite=overwrite)
        finally:
            remove_tree(temporary)
    return WrittenRepository(
        path=destination,
        models=tuple(models),
        nbytes=nbytes,
        notes=tuple(notes),
        command=tuple(command),
    )


def _write_streaming(
    bundle: EngineBundle, directory: Path, options: TritonOptions, progress: Progress
) -> None:
    """Write the streaming model, with the bundle or its path."""
    version = directory / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(model_source(), encoding="utf-8")
    where = str(bundle.directory.resolve()) if options.reference else COPIED_BUNDLE
    text = streaming_config(directory.name, where, options)
    (directory / "config.pbtxt").write_text(text, encoding="utf-8")
    if not options.reference:
        names = [entry.path for entry in bundle.manifest.files]
        progress.start("copying the bundle", bundle.nbytes, "bytes")
        for name in [*names, MANIFEST_NAME]:
            _copy(bundle.directory / name, version / COPIED_BUNDLE / name, progress)
        progress.finish()


def _write_plan(
    bundle: EngineBundle, directory: Path, plan: PlanModel, options: TritonOptions
) -> None:
    """Write the step model: engines in its version, plugin libraries beside its config."""
    directory.mkdir()
    text = plan_config(directory.name, plan, options)
    (directory / "config.pbtxt").write_text(text, encoding="utf-8")
    for file, path in plan.plans.items():
        _copy(bundle.directory / path, directory / "1" / file, NoProgress())
    for file, path in plan.plugins.items():
        _copy(bundle.directory / path, directory / "plugins" / file, NoProgress())


def _command(destination: Path, name: str, plan: PlanModel | str) -> list[str]:
    command = ["tritonserver", f"--model-repository={destination}"]
    if isinstance(plan, PlanModel) and plan.plugins:
        folder = destination / (name + STEP_SUFFIX) / "plugins"
        libraries = ";".join(str(folder / file) for file in plan.plugins)
        command.append(f"--backend-config=tensorrt,plugins={libraries}")
    return command


def _write_index(bundle: EngineBundle, directory: Path, options: TritonOptions) -> None:
    index = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tool": {"name": "ringexport", "version": __version__},
        "bundle_sha256": bundle.digest,
        "options": asdict(options),
        "files": [*walk_files(directory), INDEX_NAME],
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / INDEX_NAME).write_text(text, encoding="utf-8")


def _copy(source: Path, target: Path, progress: Progress) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as reader, target.open("wb") as writer:
        while piece := reader.read(_COPY_BYTES):
            writer.write(piece)
            progress.advance(len(piece))


def _sync(directory: Path) -> int:
    """Make everything reach the disk, and return the bytes."""
    names = list(walk_files(directory))
    for name in names:
        sync_path(directory / name)
    for folder, _, _ in os.walk(directory, topdown=False):
        sync_path(Path(folder))
    return sum((directory / name).stat().st_size for name in names)


def _publish(temporary: Path, destination: Path, *, overwrite: bool) -> None:
    _check_destination(destination, overwrite=overwrite)
    if destination.exists():
        aside = destination.with_name(f"{destination.name}.old-{uuid.uuid4().hex[:12]}")
        exchange_directories(temporary, destination, aside)
        remove_tree(aside)
    else:
        temporary.rename(destination)
    sync_path(destination.parent)


def _check_backend(bundle: EngineBundle, backend: str) -> None:
    """Refuse a backend that no server can open; whether it can run is up to the server's machine.

    Raises:
        BackendUnavailableError: neither torch nor a target of the bundle.
    """
    choices = backend_choices(bundle)
    if backend not in choices:
        raise BackendUnavailableError(
            f"the bundle {bundle.directory} has no target {backend!r:.80},"
            f" it has {', '.join(bundle.targets) or 'none'}",
            hint=f"choose {' or '.join(choices)}",
        )


def _check_destination(destination: Path, *, overwrite: bool) -> None:
    """Refuse a destination that holds anything but a repository of ringexport."""
    with _translated(destination):
        check_place(destination)
        if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
            raise OutputError(
                f"{destination} is no directory, a model repository is one",
                hint="choose another -o",
            )
        if not destination.is_dir() or not any(destination.iterdir()):
            return
        files = _indexed_files(destination)
    if files is None:
        raise OutputError(
            f"{destination} exists and was not written by ringexport triton; it is left alone",
            hint="choose another -o, or remove that directory yourself",
        )
    if not overwrite:
        raise OutputError(
            f"the model repository {destination} exists",
            hint="replace it with --force, or choose another -o",
        )
    strangers = [name for name in walk_files(destination) if name not in files]
    strangers = [name for name in strangers if "__pycache__/" not in name]
    if strangers:
        raise OutputError(
            f"{destination} holds {len(strangers)} file(s) that ringexport did not write, such as"
            f" {strangers[0]}; replacing it would lose them",
            hint="move them elsewhere, or choose another -o",
        )


def _indexed_files(directory: Path) -> set[str] | None:
    """Return the files that the index of a repository names; None if it is none of ours."""
    try:
        index = json.loads((directory / INDEX_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        return None
    files = index.get("files")
    return {str(name) for name in files} if isinstance(files, list) else set()


@contextlib.contextmanager
def _translated(destination: Path) -> Iterator[None]:
    """Say what an error of the operating system means for the output."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {error.filename or destination}: {error.strerror or error}",
            hint="choose an output that this user may write and that has room, with -o",
        ) from error
