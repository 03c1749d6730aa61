"""layers.json: what is kept beside an engine, because an engine cannot be read without its GPU."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ringexport.engine.layers import LayerRow
from ringexport.errors import BundleError
from ringexport.strict_json import read_object

__all__ = ["ENGINE_SUFFIX", "EngineTable", "read_table"]

ENGINE_SUFFIX = ".plan"
_LIMIT_BYTES = 1 << 28
_HINT = "copy the bundle again, or build it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTable:
    """Facts of an engine.

    Attributes:
        target: that it was built for.
        versions: of TensorRT and of the plugin library.
        profile: name of the shape ranges.
        engine_bytes: size of the engine.
        counts: layers by kind; plugins under their own names.
        options: of the builder, those that are not TensorRT's own choice.
    """

    target: str
    versions: dict[str, str]
    profile: str
    engine_bytes: int
    counts: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path, layers: tuple[LayerRow, ...]) -> None:
        """Write the facts, and one line for each layer."""
        facts = json.dumps(asdict(self), indent=1)
        rows = ",\n  ".join(json.dumps(layer.to_dict()) for layer in layers)
        text = f'{facts.rstrip().removesuffix("}").rstrip()},\n "layers": [\n  {rows}\n ]\n}}\n'
        path.write_text(text, encoding="utf-8")


def read_table(path: Path) -> EngineTable:
    """Read the facts.

    Raises:
        BundleError: the file is missing or damaged.
    """
    kinds: dict[str, type[Any]] = {"engine_bytes": int}
    kinds |= dict.fromkeys(("versions", "counts", "options"), dict)
    try:
        value = read_object(path, limit_bytes=_LIMIT_BYTES, error=BundleError)
    except BundleError as error:
        message = f"the layer table of an engine cannot be used: {error.message}"
        raise BundleError(message, hint=_HINT) from error
    lacking = [field.name for field in fields(EngineTable) if field.name not in value]
    if lacking:
        raise BundleError(f"the layer table {path} lacks {', '.join(lacking)}", hint=_HINT)
    found = {field.name: value[field.name] for field in fields(EngineTable)}
    for name, entry in found.items():
        if not isinstance(entry, kinds.get(name, str)):
            raise BundleError(f"the layer table {path} has {name} {entry!r:.80}", hint=_HINT)
    return EngineTable(**found)
