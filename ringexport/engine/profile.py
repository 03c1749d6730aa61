"""Shape ranges and builder options of an engine: frozen values, read from TOML."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ringexport.errors import ConfigError

__all__ = ["BuildOptions", "EngineProfile", "Range", "ShapeProfile", "load_profile"]

LETTERS = {"rows": "B", "new_tokens": "T", "logits": "L", "cache_tokens": "S"}
"""Key of a profile to the dimension that it bounds, as in docs/graph.md."""

CONTEXT = "context"
"""In a range: as many tokens as the model can hold."""

EXAMPLE_HINT = "engines/profiles/default.toml shows what a profile holds"

MAX_EXTENT = 1 << 24
MAX_WORKSPACE_MIB = 1 << 20
SHIPPED = "default"


@dataclass(frozen=True, slots=True)
class Range:
    """Smallest, most likely and largest extent of a dimension; None is the model's context."""

    smallest: int
    likely: int
    largest: int | None

    def within(self, context: int) -> tuple[int, int, int]:
        """Return the three extents, none beyond `context`."""
        largest = context if self.largest is None else self.largest
        smallest = min(self.smallest, context)
        largest = min(largest, context)
        return smallest, min(self.likely, largest), largest


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeProfile:
    """One optimization profile.

    Attributes:
        name: "prefill" or "decode".
        ranges: letter of a dimension to its range.
    """

    name: str
    ranges: Mapping[str, Range]

    def shapes(
        self, dims: tuple[int | str, ...], context: int
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the smallest, most likely and largest shape of a tensor.

        Args:
            dims: numbers, and letters of `LETTERS`.
            context: tokens that the model can hold.
        """
        columns = [
            (dim,) * 3 if isinstance(dim, int) else self._extents(dim, context) for dim in dims
        ]
        smallest, likely, largest = (tuple(column[i] for column in columns) for i in range(3))
        return smallest, likely, largest

    def _extents(self, letter: str, context: int) -> tuple[int, int, int]:
        if letter not in self.ranges:
            raise ConfigError(
                f"the profile {self.name} has no range for the dimension {letter!r}",
                hint=f"a graph of ringexport has the dimensions {', '.join(self.ranges)}",
            )
        bound = context if letter in "TS" else MAX_EXTENT
        return self.ranges[letter].within(bound)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What the builder is told. None is TensorRT's own choice.

    Attributes:
        optimization_level: 0 to 5, higher builds longer.
        workspace_mib: scratch memory of one layer at most.
        timing_cache: keep timings between builds in this file; TensorRT-RTX times nothing.
        version_compatible: the engine runs in later versions of TensorRT too.
        refit: weights can be exchanged later.
        weight_streaming: weights may stay in host memory, for a program that sets the budget; the
            runner sets none, which keeps all on the GPU.
        strip_plan: leave weights out that a refit will bring; needs a GPU to build.
    """

    optimization_level: int | None = None
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    refit: bool = False
    weight_streaming: bool = False
    strip_plan: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from TensorRT's own choice; the timing cache shapes no engine."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        del values["timing_cache"]
        return {
            name: value
            for name, value in values.items()
            if value is not None and value is not False
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineProfile:
    """How engines are built.

    Attributes:
        name: of the file.
        decode, prefill: shape ranges; profile 0 and 1 of the engine.
        options: of the builder.
    """

    name: str
    decode: ShapeProfile
    prefill: ShapeProfile
    options: BuildOptions = BuildOptions()

    @property
    def shapes(self) -> tuple[ShapeProfile, ...]:
        """All optimization profiles, by index."""
        return (self.decode, self.prefill)

    def limits(self, context: int) -> dict[str, int]:
        """Return the largest sizes that a runner may use, for the manifest."""
        found = {}
        for profile in self.shapes:
            for key, letter in LETTERS.items():
                found[f"{profile.name}_{key}"] = profile.shapes((letter,), context)[2][0]
        return found


DEFAULT_PROFILE = EngineProfile(
    name=SHIPPED,
    decode=ShapeProfile(
        name="decode",
        ranges={
            "B": Range(1, 1, 64),
            "T": Range(1, 1, 1),
            "L": Range(1, 1, 1),
            "S": Range(1, 4096, None),
        },
    ),
    prefill=ShapeProfile(
        name="prefill",
        ranges={
            "B": Range(1, 1, 8),
            "T": Range(2, 512, 4096),
            "L": Range(1, 1, 64),
            "S": Range(2, 4096, None),
        },
    ),
)
"""What engines/profiles/default.toml says; a test compares them."""


def load_profile(name: str = SHIPPED) -> EngineProfile:
    """Return the shipped profile, or that of a .toml file.

    Raises:
        ConfigError: the file cannot be read, or has unknown keys or impossible values.
    """
    if name == SHIPPED:
        return DEFAULT_PROFILE
    path = Path(name)
    if path.suffix != ".toml":
        raise ConfigError(
            f"unknown engine profile {name!r}", hint=f"choices: {SHIPPED}, or a .toml file"
        )
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"the engine profile {path} cannot be read: {reason}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the engine profile {path} is no TOML: {error!s:.200}", hint=EXAMPLE_HINT
        ) from error
    _check_keys(value, ("decode", "prefill", "options"), str(path))
    profile = EngineProfile(
        name=path.stem,
        decode=_shape_profile(value, "decode", DEFAULT_PROFILE.decode, path),
        prefill=_shape_profile(value, "prefill", DEFAULT_PROFILE.prefill, path),
        options=_options(value.get("options", {}), path),
    )
    if profile.decode.ranges["T"] != Range(1, 1, 1):
        raise ConfigError(
            f"{path}: decode.new_tokens is not [1, 1, 1]", hint="leave it out of the file"
        )
    return profile


def _shape_profile(
    value: Mapping[str, Any], name: str, base: ShapeProfile, path: Path
) -> ShapeProfile:
    table = value.get(name, {})
    where = f"{path}: {name}"
    _check_keys(table, tuple(LETTERS), where)
    given = {LETTERS[key]: _range(entry, f"{where}.{key}") for key, entry in table.items()}
    for key in table:
        least, found = base.ranges[LETTERS[key]].smallest, given[LETTERS[key]]
        if found.smallest > least or (found.largest is not None and found.largest < least):
            raise ConfigError(
                f"{where}.{key} is {table[key]}, expected a range that holds {least}",
                hint="the smallest call that a runner makes has to fit",
            )
    return replace(base, ranges={**base.ranges, **given})


def _range(entry: Any, where: str) -> Range:
    correct = isinstance(entry, list) and len(entry) == 3
    if correct:
        *small, last = entry
        numbers = small if last == CONTEXT else entry
        correct = all(type(number) is int and 1 <= number <= MAX_EXTENT for number in numbers)
        correct = correct and numbers == sorted(numbers)
    if not correct:
        raise ConfigError(
            f"{where} is {str(entry)[:80]}, expected three rising numbers of 1 to {MAX_EXTENT}, the"
            f" last of which may be {CONTEXT!r}",
            hint=EXAMPLE_HINT,
        )
    return Range(entry[0], entry[1], None if entry[2] == CONTEXT else entry[2])


def _options(table: Any, path: Path) -> BuildOptions:
    where = f"{path}: options"
    _check_keys(table, tuple(field.name for field in fields(BuildOptions)), where)
    kinds = {field.name: field.default for field in fields(BuildOptions)}
    for key, entry in table.items():
        wanted: type = bool if kinds[key] is False else str if key == "timing_cache" else int
        if type(entry) is not wanted:
            raise ConfigError(
                f"{where}.{key} is {entry!r:.80}, expected {wanted.__name__}", hint=EXAMPLE_HINT
            )
    level, workspace = table.get("optimization_level", 0), table.get("workspace_mib", 1)
    if not 0 <= level <= 5:
        raise ConfigError(
            f"{where}.optimization_level is {level}, expected 0 to 5", hint=EXAMPLE_HINT
        )
    if not 1 <= workspace <= MAX_WORKSPACE_MIB:
        raise ConfigError(
            f"{where}.workspace_mib is {workspace}, expected 1 to {MAX_WORKSPACE_MIB}",
            hint=EXAMPLE_HINT,
        )
    cache = table.get("timing_cache")
    if cache == "":
        raise ConfigError(
            f"{where}.timing_cache is empty, expected the path of a file",
            hint="leave it out to keep no timings",
        )
    return BuildOptions(**(table | ({"timing_cache": Path(cache)} if cache else {})))


def _check_keys(table: Any, known: tuple[str, ...], where: str) -> None:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} is no table", hint=EXAMPLE_HINT)
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            guess = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"{where} has the unknown key {key!r}", hint=f"{guess}choices: {', '.join(known)}"
            )
