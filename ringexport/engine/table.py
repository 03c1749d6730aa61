"""layers.json: what is kept beside an engine, because an engine cannot be read without its GPU."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ringexport.engine.layers import LayerRow
from ringexport.errors import BundleError

__all__ = ["ENGINE_SUFFIX", "EngineTable", "read_table"]

ENGINE_SUFFIX = ".plan"


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
        value = json.loads(path.read_text(encoding="utf-8"))
        found = {field.name: value[field.name] for field in fields(EngineTable)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"the layer table {path} cannot be read: {error!r:.200}",
            hint="copy the bundle again, or build it again",
        ) from error
    for name, entry in found.items():
        if not isinstance(entry, kinds.get(name, str)):
            raise BundleError(f"the layer table {path} has {name} {entry!r:.80}")
    return EngineTable(**found)
