"""Open a bundle: check that it is complete, unchanged and of a format that this version reads."""

import dataclasses
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from ringexport.bundle.consistency import check_consistency
from ringexport.bundle.files import file_entry, strangers_in_bundle
from ringexport.bundle.manifest import MANIFEST_NAME, FileEntry, Manifest, TargetInfo
from ringexport.errors import BundleError, DigestError
from ringexport.progress import NoProgress, Progress

__all__ = ["EngineBundle"]

log = logging.getLogger(__name__)

_MAX_MANIFEST_BYTES = 64 << 20
_REBUILD = "copy it again, or build it again with: ringexport build"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineBundle:
    """An opened bundle.

    Attributes:
        directory: where it is.
        manifest: its checked index.
        digest: SHA-256 of the manifest, hence of everything in the bundle, but for the path of the
            checkpoint: the same build in two places has one digest.
    """

    directory: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(
        cls, path: Path | str, *, verify: bool = True, progress: Progress | None = None
    ) -> "EngineBundle":
        """Open the bundle at `path`.

        Args:
            path: the bundle's directory.
            verify: also read every file and compare its SHA-256; without it only the sizes are
                compared, which finds half-copied bundles but not changed ones.
            progress: told about the bytes that are verified.

        Raises:
            VersionError: the bundle is in a newer format.
            DigestError: a file is missing, has another size, or another content.
            BundleError: this is no bundle, or its manifest is damaged or contradicts its config.
        """
        directory = Path(path)
        text = _read_manifest(directory)
        try:
            manifest = Manifest.from_json(text, source=str(directory / MANIFEST_NAME))
        except BundleError as error:
            raise type(error)(error.message, hint=error.hint or _REBUILD) from error
        _check_files(directory, manifest)
        if verify:
            _check_digests(directory, manifest, progress or NoProgress())
        try:
            check_consistency(directory, manifest)
        except BundleError as error:
            raise BundleError(error.message, hint=_REBUILD) from error
        digest = _digest(manifest)
        log.debug("opened %s, manifest %s, verified: %s", directory, digest[:12], verify)
        return cls(directory=directory, manifest=manifest, digest=digest)

    @property
    def targets(self) -> dict[str, TargetInfo]:
        """The targets by name, such as "onnxruntime:cpu"."""
        return self.manifest.targets

    @property
    def nbytes(self) -> int:
        """Size of all files that the manifest lists."""
        return sum(entry.size for entry in self.manifest.files)

    @property
    def source_path(self) -> Path:
        """Where the checkpoint was when the bundle was built; it may have moved."""
        return (self.directory.resolve() / self.manifest.source.path).resolve()

    def path(self, relative: str) -> Path:
        """Return the path of a file of the bundle.

        Raises:
            BundleError: the manifest does not list it.
        """
        if all(entry.path != relative for entry in self.manifest.files):
            raise BundleError(f"the bundle {self.directory} has no file {relative}")
        return self.directory / relative


def _digest(manifest: Manifest) -> str:
    """Return the SHA-256 of a manifest, wherever its checkpoint was."""
    anywhere = dataclasses.replace(manifest.source, path="")
    text = dataclasses.replace(manifest, source=anywhere).to_json()
    return hashlib.sha256(text.encode()).hexdigest()


def _read_manifest(directory: Path) -> str:
    """Return the text of the manifest, or say what `directory` is instead of a bundle."""
    path = directory / MANIFEST_NAME
    try:
        if not directory.exists():
            raise BundleError(
                f"there is no bundle at {directory}: no such directory",
                hint="build one: ringexport build CHECKPOINT -o BUNDLE",
            )
        if not directory.is_dir():
            raise BundleError(
                f"{directory} is a file, a bundle is a directory",
                hint="ringexport inspect tells what a file is",
            )
        if not path.is_file():
            raise BundleError(
                f"{directory} is not a ringexport bundle: it has no {MANIFEST_NAME}",
                hint=_guess(directory),
            )
        size = path.stat().st_size
        if size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{path} has {size:,} bytes, more than any manifest")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path} is not UTF-8 text", hint=_REBUILD) from error
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BundleError(f"cannot use {str(directory)!r} as a path: {error}") from error


def _guess(directory: Path) -> str:
    if (directory / "config.json").is_file():
        return f"it looks like a checkpoint; build it: ringexport build {directory} -o BUNDLE"
    return "give the directory that ringexport build wrote with -o"


def _check_files(directory: Path, manifest: Manifest) -> None:
    """Compare names and sizes with the manifest."""
    root = directory.resolve()
    for entry in manifest.files:
        _check_size(root, entry)
    try:
        strangers = strangers_in_bundle(directory, hidden=False)
    except (OSError, json.JSONDecodeError) as error:
        raise BundleError(f"cannot list {directory}: {error}") from error
    if strangers:
        raise BundleError(
            f"the bundle {directory} holds {len(strangers)} file(s) that its manifest does not"
            f" list: {', '.join(strangers[:3])}",
            hint="move them out of the bundle",
        )


def _check_size(root: Path, entry: FileEntry) -> None:
    path = root / entry.path
    try:
        inside = path.resolve(strict=True).is_relative_to(root)
        is_file = path.is_file()
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise DigestError(
            f"the bundle {root} lacks {entry.path}: it was not copied completely", hint=_REBUILD
        ) from error
    except (OSError, RuntimeError) as error:
        raise BundleError(f"cannot read {path}: {error}") from error
    if not inside or not is_file:
        raise BundleError(f"{path} is not a file inside the bundle", hint=_REBUILD)
    if size != entry.size:
        raise DigestError(
            f"{path} has {size:,} bytes, the manifest says {entry.size:,}: it was not copied"
            " completely or was changed",
            hint=_REBUILD,
        )


def _check_digests(directory: Path, manifest: Manifest, progress: Progress) -> None:
    """Read every file and compare its SHA-256."""
    total = sum(entry.size for entry in manifest.files)
    progress.start("verifying the bundle", total, "bytes")
    for entry in manifest.files:
        try:
            found = file_entry(directory, entry.path, progress.advance)
        except OSError as error:
            raise BundleError(f"cannot read {directory / entry.path}: {error.strerror}") from error
        if found.sha256 != entry.sha256:
            raise DigestError(
                f"{directory / entry.path} was changed after the build: its SHA-256 is"
                f" {found.sha256[:12]}…, the manifest says {entry.sha256[:12]}…",
                hint=_REBUILD,
            )
    progress.finish()
