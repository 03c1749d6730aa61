"""Which modules lose most by quantization, and what to leave alone for a size budget."""

import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from ringexport.checkpoint import CheckpointWeights
from ringexport.checkpoint.names import TensorKind
from ringexport.compare.perplexity import PairScore
from ringexport.errors import ConfigError, OutputError
from ringexport.ops.schemes import ModuleScheme
from ringexport.progress import NoProgress, Progress
from ringexport.quantize.modules import QUANTIZABLE_KINDS
from ringexport.quantize.recipe import Recipe, RecipeRule
from ringexport.quantize.resolve import ResolvedModule, resolve_recipe
from ringexport.quantize.run import estimate, quantize_checkpoint
from ringexport.stats import CalibrationStats

__all__ = [
    "Measure",
    "MixedRecipe",
    "ModuleGroup",
    "SensitivityRow",
    "check_budget",
    "module_groups",
    "only_group",
    "parse_size",
    "propose",
    "sensitivity",
    "without_groups",
]

Measure = Callable[[Path], PairScore]
"""Scores a quantized checkpoint against the unquantized one."""

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20}
_UNITS["gib"] = 1 << 30
_PATTERNS = {
    TensorKind.ROUTED_EXPERTS: "mlp.experts.*",
    TensorKind.SHARED_EXPERTS: "mlp.shared_experts.*",
    TensorKind.DENSE_MLP: "mlp.*",
    TensorKind.LINEAR_ATTENTION: "attention.*",
    TensorKind.SOFTMAX_ATTENTION: "attention.*",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleGroup:
    """The quantized modules of one kind in one layer.

    Attributes:
        kind: of the modules.
        layer: None for lm_head.
        target: selects them in a recipe.
        modules: how many.
        bytes_saved: how much smaller the recipe makes them, scales counted.
    """

    kind: TensorKind
    layer: int | None
    target: str
    modules: int
    bytes_saved: int

    def __str__(self) -> str:
        """Return a name for people."""
        return self.kind.value if self.layer is None else f"layer {self.layer} {self.kind.value}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SensitivityRow:
    """What quantizing one group alone costs.

    Attributes:
        group: all others keep their precision.
        kl_mean: nats per token.
        perplexity_change: relative.
    """

    group: ModuleGroup
    kl_mean: float
    perplexity_change: float

    @property
    def kl_per_megabyte(self) -> float:
        """KL paid per million bytes saved; infinite where nothing is saved."""
        saved = self.group.bytes_saved / 1e6
        return self.kl_mean / saved if saved > 0 else float("inf")

    def to_dict(self) -> dict[str, object]:
        """Return JSON values."""
        return {
            "kind": self.group.kind.value,
            "layer": self.group.layer,
            "target": self.group.target,
            "modules": self.group.modules,
            "bytes_saved": self.group.bytes_saved,
            "kl_mean": self.kl_mean,
            "perplexity_change": self.perplexity_change,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRecipe:
    """A proposal: a recipe with some groups left as they are.

    Attributes:
        base: name or path of the recipe that it starts from.
        kept: groups that are not quantized.
        num_bytes: of the weights.
        predicted_kl: sum of the other groups' KL; errors are taken to add up.
    """

    base: str
    kept: tuple[ModuleGroup, ...]
    num_bytes: int
    predicted_kl: float

    def to_toml(self) -> str:
        """Return a recipe file."""
        about = f"{self.base} with {len(self.kept)} groups of modules left as they are"
        lines = [f'description = "{_escaped(about)}"', f'base = "{_escaped(self.base)}"']
        if self.kept:
            targets = "\n".join(f'  "{group.target}", # {group.kind.value}' for group in self.kept)
            lines += ["", "[[rules]]", f"targets = [\n{targets}\n]", 'scheme = "unquantized"']
        return "\n".join(lines) + "\n"

    def save(self, path: Path) -> None:
        """Write a recipe file; an older one is replaced in one step.

        Raises:
            OutputError: it cannot be written.
        """
        temporary = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:12]}")
        try:
            temporary.write_text(self.to_toml(), encoding="utf-8")
            temporary.replace(path)
        except OSError as failure:
            raise OutputError(f"cannot write {path}: {failure.strerror or failure}") from failure
        finally:
            temporary.unlink(missing_ok=True)


def module_groups(checkpoint: Path, recipe: Recipe) -> tuple[ModuleGroup, ...]:
    """Return the groups of modules that a recipe quantizes, in the order of the model.

    Raises:
        RingExportError: a checkpoint or recipe that cannot be used.
    """
    with CheckpointWeights.open(checkpoint) as weights:
        entries = list(resolve_recipe(recipe, weights.config).quantized.values())
        sizes = {entry.module.name: weights.info(entry.module.weight).nbytes for entry in entries}
    groups = []
    for (kind, layer), members in groupby(sorted(entries, key=_order), key=_key):
        found = list(members)
        groups.append(
            ModuleGroup(
                kind=kind,
                layer=layer,
                target=kind.value if layer is None else f"model.layers.{layer}.{_PATTERNS[kind]}",
                modules=len(found),
                bytes_saved=sum(sizes[entry.module.name] - _stored(entry) for entry in found),
            )
        )
    return tuple(groups)


def only_group(recipe: Recipe, group: ModuleGroup) -> Recipe:
    """Return a recipe that quantizes one group as `recipe` does, and nothing else.

    The KV cache and the recurrent state keep their precision too.
    """
    everything = RecipeRule(
        targets=tuple(kind.value for kind in QUANTIZABLE_KINDS),
        exceptions=(group.target,),
        scheme=ModuleScheme(),
    )
    plain = replace(recipe, kv_cache=None, name=f"{recipe.name}: {group}")
    return replace(plain, rules=(*recipe.rules, everything))


def without_groups(recipe: Recipe, groups: Sequence[ModuleGroup]) -> Recipe:
    """Return `recipe` with some groups left as they are."""
    if not groups:
        return recipe
    targets = tuple(group.target for group in groups)
    rule = RecipeRule(targets=targets, scheme=ModuleScheme())
    return replace(recipe, rules=(*recipe.rules, rule))


def sensitivity(
    checkpoint: Path,
    recipe: Recipe,
    measure: Measure,
    *,
    stats: CalibrationStats | None = None,
    progress: Progress | None = None,
) -> tuple[SensitivityRow, ...]:
    """Quantize one group of modules at a time and measure what it costs.

    Args:
        checkpoint: folder of the unquantized checkpoint.
        recipe: how each group is quantized.
        measure: scores a quantized checkpoint.
        stats: of a calibration, for recipes that need them.
        progress: told about the groups.

    Returns:
        Rows, the largest KL per byte saved first.

    Raises:
        RingExportError: whatever quantizing or measuring raises.
    """
    progress = progress or NoProgress()
    groups = module_groups(checkpoint, recipe)
    rows = []
    progress.start(f"quantizing {len(groups)} groups one at a time", len(groups), "groups")
    with tempfile.TemporaryDirectory(prefix="ringexport-") as scratch:
        for group in groups:
            output = Path(scratch) / "checkpoint"
            quantize_checkpoint(checkpoint, output, only_group(recipe, group), stats=stats)
            score = measure(output)
            rows.append(
                SensitivityRow(
                    group=group, kl_mean=score.kl_mean, perplexity_change=score.perplexity_change
                )
            )
            progress.advance()
    progress.finish()
    return tuple(sorted(rows, key=lambda row: -row.kl_per_megabyte))


def check_budget(checkpoint: Path, recipe: Recipe, max_bytes: int) -> int:
    """Return the bytes of the weights if everything that a recipe names is quantized.

    Raises:
        ConfigError: that is more than the budget.
    """
    total = estimate(checkpoint, recipe).output_bytes
    if total > max_bytes:
        raise ConfigError(
            f"recipe {recipe.name} alone takes {total:,} bytes, the budget is {max_bytes:,}",
            hint="give a larger budget, or a recipe that quantizes more",
        )
    return total


def propose(
    checkpoint: Path, recipe: Recipe, base: str, rows: Sequence[SensitivityRow], max_bytes: int
) -> MixedRecipe:
    """Leave the groups with the largest KL per byte as they are, as far as a budget allows.

    Args:
        checkpoint: folder of the unquantized checkpoint.
        recipe: that the rows were measured with.
        base: its name or path, for the new recipe.
        rows: of `sensitivity`.
        max_bytes: of the weights.

    Raises:
        ConfigError: not even the whole recipe fits.
    """
    total = check_budget(checkpoint, recipe, max_bytes)
    kept: list[SensitivityRow] = []
    for row in sorted(rows, key=lambda row: -row.kl_per_megabyte):
        candidate = without_groups(recipe, [one.group for one in (*kept, row)])
        if len(kept) == len(rows) - 1 or total + row.group.bytes_saved // 2 > max_bytes:
            continue  # something stays quantized; names of scales take some bytes too
        size = estimate(checkpoint, candidate).output_bytes
        if size <= max_bytes:
            kept.append(row)
            total = size
    return MixedRecipe(
        base=base,
        kept=tuple(row.group for row in kept),
        num_bytes=total,
        predicted_kl=sum(row.kl_mean for row in rows) - sum(row.kl_mean for row in kept),
    )


def parse_size(text: str) -> int:
    """Read a number of bytes such as "9.5MB", "20 GiB" or "1000".

    Raises:
        ConfigError: anything else.
    """
    number = text.strip().rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text.strip()[len(number) :].strip().lower()
    factor = _UNITS.get("" if unit == "b" else unit)
    plain = number.replace(".", "", 1)
    if factor is None or not (plain.isascii() and plain.isdecimal()) or len(plain) > 15:
        raise ConfigError(
            f"the size {text[:40]!r} is not known, expected a number of bytes such as 9.5MB",
            hint="units: kB, MB, GB, KiB, MiB, GiB",
        )
    return int(float(number) * factor)


def _key(entry: ResolvedModule) -> tuple[TensorKind, int | None]:
    parts = entry.module.name.split(".")
    layer = int(parts[2]) if parts[:2] == ["model", "layers"] else None
    return entry.module.kind, layer


def _order(entry: ResolvedModule) -> tuple[int, int]:
    kind, layer = _key(entry)
    return (1 << 30 if layer is None else layer), list(TensorKind).index(kind)


def _stored(entry: ResolvedModule) -> int:
    """Return the bytes of codes and scales."""
    weights = entry.scheme.weights
    assert weights is not None
    shape = entry.module.shape
    scales = 1
    for size in weights.granularity.scale_shape(shape):
        scales *= size
    return shape[0] * shape[1] * weights.format.dtype.itemsize + 4 * scales


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
