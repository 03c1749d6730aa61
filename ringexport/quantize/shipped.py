"""Find and read recipes: those that come with ringexport, by name, and the user's own files."""

import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import ringexport
from ringexport.errors import ConfigError
from ringexport.quantize.recipe import Recipe

__all__ = ["load_recipe", "shipped_recipes"]

_LIMIT_BYTES = 1 << 20
_FILE_HINT = "give a file like those in calibration/recipes"
_SUFFIX = ".toml"
_MAX_BASES = 8


def shipped_recipes() -> tuple[str, ...]:
    """Return the names of the recipes that come with ringexport, sorted."""
    return tuple(sorted(path.stem for path in _directory().glob("*" + _SUFFIX)))


def load_recipe(name: str) -> Recipe:
    """Read a recipe.

    Args:
        name: of a shipped recipe, or the path of a TOML file, recognised by its suffix.

    Raises:
        ConfigError: no such recipe, or a file that cannot be used.
    """
    return _load(name, Path(), ())


def _load(name: str, directory: Path, above: tuple[str, ...]) -> Recipe:
    """Read a recipe; relative paths start at `directory`, `above` are the recipes based on it."""
    path = _path_of(name, directory)
    source = str(path) if name.endswith(_SUFFIX) else f"recipe {name}"
    if len(above) >= _MAX_BASES:
        raise ConfigError(f"recipe {above[0]} has more than {_MAX_BASES} recipes below it")
    values = _read(path, source)
    base = values.get("base")
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{source}: base is {base!r:.80}, expected the name of a recipe")
    return Recipe.from_dict(
        values,
        name=path.stem,
        source=source,
        base=None if base is None else _load(base, path.parent, (*above, name)),
    )


def _path_of(name: str, directory: Path) -> Path:
    if name.endswith(_SUFFIX):
        return directory / name
    known = shipped_recipes()
    if name in known:
        return _directory() / (name + _SUFFIX)
    nearest = get_close_matches(name[:100], known, n=1)
    raise ConfigError(
        f"there is no recipe {name[:100]!r}",
        hint=(f"did you mean {nearest[0]!r}? " if nearest else "")
        + f"choices: {', '.join(known)}, or a .toml file",
    )


def _read(path: Path, source: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(_LIMIT_BYTES + 1)
    except OSError as failure:
        raise ConfigError(f"cannot read {path}: {failure.strerror or failure}") from failure
    if len(data) > _LIMIT_BYTES:
        raise ConfigError(
            f"{source} has more than {_LIMIT_BYTES:,} bytes",
            hint=_FILE_HINT,
        )
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as failure:
        raise ConfigError(
            f"{source} is not valid TOML: {failure!s:.200}",
            hint=_FILE_HINT,
        ) from failure


def _directory() -> Path:
    """Return the folder of the shipped recipes: in the package, or in the repository beside it."""
    package = Path(ringexport.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "calibration" / "recipes"
