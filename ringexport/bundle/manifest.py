"""The manifest of a bundle: what it was built from, how, and the digest of every file."""

import re
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from ringexport.bundle.strict_json import decode, encode, parse_object
from ringexport.errors import BundleError, VersionError

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "CalibrationInfo",
    "DecayTable",
    "FileEntry",
    "Manifest",
    "ModelInfo",
    "QuantizationInfo",
    "ResolvedBuild",
    "SchemeInfo",
    "SourceInfo",
    "TargetIO",
    "TargetInfo",
    "ToolInfo",
    "check_relative_path",
]

FORMAT = "ringexport-bundle"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file: its path with forward slashes, its size in bytes and its SHA-256 in hex."""

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        if self.size < 0:
            raise BundleError(f"{self.path} has a negative size in the manifest: {self.size}")
        if not _SHA256.fullmatch(self.sha256):
            raise BundleError(f"{self.path} has no SHA-256 in the manifest: {self.sha256[:80]!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolInfo:
    """The program that wrote the bundle."""

    name: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceInfo:
    """The checkpoint: where it was, seen from the bundle's directory, and what was in it."""

    path: str
    files: tuple[FileEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The facts of the model that a runner or a person asks for first."""

    architecture: str
    config_sha256: str
    num_parameters: int
    num_layers: int
    vocab_size: int
    context_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedBuild:
    """A build without any "auto": everything that decides what the files hold.

    Attributes:
        recipe: name of the quantization recipe.
        compute_dtype: what the targets compute in.
        decay_index: which form of the layer factor of the decay ("serving", "hf" or "clamped").
        targets: sorted, without duplicates.
    """

    recipe: str
    compute_dtype: str
    decay_index: str
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationInfo:
    """The calibration that scales and smoothing come from.

    Attributes:
        prompts: name of the prompt set or file.
        tokens_sha256: of the token ids that were run; None where the stats do not say.
        stats_sha256: of the stats file.
        num_samples, num_tokens: how much was run.
    """

    prompts: str
    tokens_sha256: str | None = None
    stats_sha256: str
    num_samples: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeInfo:
    """The modules of one kind that share a scheme.

    Attributes:
        kind: of the modules.
        weights, activations: format and granularity; None for unquantized.
        modules: how many.
        parameters: elements of their weights.
    """

    kind: str
    weights: str | None = None
    activations: str | None = None
    modules: int
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationInfo:
    """How the weights were quantized; left out of the manifest where none are.

    Attributes:
        modules_sha256: of the recipe and the scheme of every module.
        schemes: the same in short.
        source_bytes: of the weights before.
        weight_bytes: of the quantized checkpoint's weight files.
        saturated: elements that were clipped, by module; modules without any are left out.
        calibration: None where the recipe needs none, or the checkpoint came quantized.
        notes: what the targets compute otherwise than the schemes say.
    """

    modules_sha256: str
    schemes: tuple[SchemeInfo, ...]
    source_bytes: int
    weight_bytes: int
    saturated: dict[str, int] = field(default_factory=dict)
    calibration: CalibrationInfo | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DecayTable:
    """The decay that the graph was built with.

    Attributes:
        form: the decay index, as in `ResolvedBuild`.
        table: for each linear layer (its number as text) the log decay of each head, <= 0.
    """

    form: str
    table: dict[str, tuple[float, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetIO:
    """Inputs and outputs of a target's graph.

    Attributes:
        linear_layers: layers with a recurrent state.
        softmax_layers: layers with a KV cache.
        shapes: per kind of tensor ("past_state", "past_key", "past_value", "logits") its
            dimensions; letters (B batch, S cached tokens, L asked positions) vary per call.
    """

    linear_layers: tuple[int, ...]
    softmax_layers: tuple[int, ...]
    shapes: dict[str, tuple[int | str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetInfo:
    """One target: its directory, the role of its files, its tensors and its limits.

    Attributes:
        directory: path inside the bundle.
        files: role ("graph", "probe", "weights") to path inside the bundle.
        io: what goes in and out.
        limits: numbers that a runner must keep to, such as "context_length".
    """

    directory: str
    files: dict[str, str]
    io: TargetIO
    limits: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """manifest.json. Equal manifests give equal bytes; `created` is left out unless asked for."""

    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    created: str | None = None
    tool: ToolInfo
    versions: dict[str, str]
    source: SourceInfo
    model: ModelInfo
    build: ResolvedBuild
    quantization: QuantizationInfo | None = None
    decay: DecayTable
    targets: dict[str, TargetInfo]
    files: tuple[FileEntry, ...] = ()

    def to_json(self) -> str:
        """Return the canonical text: sorted keys, newline at the end."""
        return encode(self)

    @classmethod
    def from_json(cls, text: str, *, source: str = MANIFEST_NAME) -> "Manifest":
        """Read and check a manifest.

        Args:
            text: the JSON text.
            source: what to call it in messages.

        Raises:
            VersionError: written in a newer format.
            BundleError: not a manifest, or keys, types or paths that are wrong.
        """
        value = parse_object(text, source=source)
        if value.get("format") != FORMAT:
            raise BundleError(
                f"{source} is no bundle manifest: its format is {str(value.get('format'))[:80]!r},"
                f" expected {FORMAT!r}"
            )
        version = value.get("format_version")
        if type(version) is not int or version < 1:
            raise BundleError(f"{source} has the format_version {version!r}, expected a number")
        if version > FORMAT_VERSION:
            raise VersionError(
                f"{source} is in bundle format {version}, this version reads up to"
                f" {FORMAT_VERSION}",
                hint="upgrade ringexport, or build the bundle again with this version",
            )
        manifest = decode(cls, value, source)
        manifest.check_paths()
        return manifest

    def check_paths(self) -> None:
        """Check that there is a target, paths stay inside the bundle, and roles name listed files.

        Raises:
            BundleError: no target, or a path that leaves the directory, is listed twice, or is not
                listed.
        """
        listed: set[str] = set()
        for entry in self.files:
            check_relative_path(entry.path)
            if entry.path in listed or entry.path == MANIFEST_NAME:
                raise BundleError(f"the manifest lists {entry.path} twice")
            listed.add(entry.path)
        for name, target in self.targets.items():
            check_relative_path(target.directory)
            for role, path in target.files.items():
                if path not in listed:
                    raise BundleError(
                        f"target {name} names {path!r} as its {role}, which the manifest does not"
                        " list among its files"
                    )
                if not path.startswith(target.directory + "/"):
                    raise BundleError(
                        f"target {name} names {path!r} as its {role}, which is not in its"
                        f" directory {target.directory!r}"
                    )
        if not self.targets:
            raise BundleError("the manifest names no target: nothing in this bundle can run")


def check_relative_path(path: str) -> None:
    """Refuse paths that are absolute, leave the bundle, or mean another file elsewhere.

    Raises:
        BundleError: the path is refused.
    """
    parts = PurePosixPath(path).parts
    harmless = (
        bool(path)
        and "\\" not in path
        and ":" not in path
        and path.isprintable()
        and not path.startswith("/")
        and ".." not in parts
        and "/".join(parts) == path
    )
    if not harmless:
        raise BundleError(
            f"the manifest names the path {path[:200]!r}, which is not a plain path inside the"
            " bundle",
            hint="this bundle was not written by ringexport; do not use it",
        )
