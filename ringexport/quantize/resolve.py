"""Apply a recipe to a model: every module that can be quantized gets exactly one scheme."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from ringexport.checkpoint.config import RingConfig
from ringexport.errors import QuantizationError
from ringexport.ops.quantization import GranularityKind
from ringexport.quantize.modules import (
    QuantizableModule,
    protected_modules,
    quantizable_modules,
    select,
)
from ringexport.quantize.recipe import Recipe, RecipeRule
from ringexport.quantize.scheme import ModuleScheme

__all__ = ["ResolvedModule", "ResolvedRecipe", "SchemeRow", "resolve_recipe", "scheme_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModule:
    """One module and the one scheme that it gets."""

    module: QuantizableModule
    scheme: ModuleScheme


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeRow:
    """The modules of one kind that share a scheme, for people.

    Attributes:
        kind: of the modules.
        scheme: what they get.
        modules: how many there are.
        parameters: elements of their weights.
        example: the first of them.
    """

    kind: str
    scheme: ModuleScheme
    modules: int
    parameters: int
    example: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedRecipe:
    """A recipe applied to one config: the complete table of modules, nothing left to decide.

    Attributes:
        recipe: what was asked for.
        modules: every quantizable module, in the order of the model.
    """

    recipe: Recipe
    modules: tuple[ResolvedModule, ...]

    @property
    def quantized(self) -> dict[str, ResolvedModule]:
        """The modules whose weights are quantized, by name."""
        return {
            entry.module.name: entry for entry in self.modules if entry.scheme.weights is not None
        }

    @property
    def stats_reasons(self) -> tuple[str, ...]:
        """Why this recipe needs calibration stats; empty if it does not."""
        reasons = []
        static = sum(entry.scheme.needs_stats for entry in self.modules)
        if static:
            reasons.append(f"static activation scales of {static} modules")
        if self.recipe.kv_cache is not None:
            reasons.append("static scales of the KV cache")
        if self.recipe.smoothquant is not None:
            reasons.append("SmoothQuant")
        return tuple(reasons)

    @property
    def digest(self) -> str:
        """SHA-256 of the recipe and the scheme of every module, hexadecimal."""
        table = [[entry.module.name, repr(entry.scheme)] for entry in self.modules]
        return hashlib.sha256(json.dumps([repr(self.recipe), table]).encode()).hexdigest()

    def rows(self) -> tuple[SchemeRow, ...]:
        """Return the table in short: one row per kind and scheme, in the order of the model."""
        return scheme_rows((entry.module, entry.scheme) for entry in self.modules)


def scheme_rows(
    modules: Iterable[tuple[QuantizableModule, ModuleScheme]],
) -> tuple[SchemeRow, ...]:
    """Put modules of one kind and scheme together, in the order in which they come."""
    groups: dict[tuple[str, ModuleScheme], list[QuantizableModule]] = {}
    for module, scheme in modules:
        groups.setdefault((module.kind.value, scheme), []).append(module)
    return tuple(
        SchemeRow(
            kind=kind,
            scheme=scheme,
            modules=len(group),
            parameters=sum(module.shape[0] * module.shape[1] for module in group),
            example=group[0].name,
        )
        for (kind, scheme), group in groups.items()
    )


def resolve_recipe(recipe: Recipe, config: RingConfig) -> ResolvedRecipe:
    """Apply the rules of `recipe` in their order; the last one that selects a module wins.

    Raises:
        ConfigError: a pattern that matches nothing, or only what can never be quantized.
        QuantizationError: groups that do not divide the columns of a module.
    """
    modules = quantizable_modules(config)
    protected = protected_modules(config)
    schemes = dict.fromkeys((module.name for module in modules), ModuleScheme())
    for number, rule in enumerate(recipe.rules):
        where = f"recipe {recipe.name}: rules[{number}]"
        for name in _selected(rule, modules, protected, where):
            schemes[name] = rule.scheme
    resolved = tuple(
        ResolvedModule(module=module, scheme=schemes[module.name]) for module in modules
    )
    _check_groups(resolved)
    return ResolvedRecipe(recipe=recipe, modules=resolved)


def _selected(
    rule: RecipeRule,
    modules: tuple[QuantizableModule, ...],
    protected: tuple[str, ...],
    where: str,
) -> set[str]:
    chosen: set[str] = set()
    for target in rule.targets:
        chosen |= select(target, modules, protected, f"{where}.targets")
    candidates = tuple(module for module in modules if module.name in chosen)
    for target in rule.exceptions:
        chosen -= select(target, candidates, protected, f"{where}.except")
    return chosen


def _check_groups(modules: Iterable[ResolvedModule]) -> None:
    """Refuse ragged groups: engines and compressed-tensors cannot load them."""
    for entry in modules:
        weights = entry.scheme.weights
        if weights is None or weights.granularity.kind is not GranularityKind.GROUP:
            continue
        columns = entry.module.shape[1]
        if columns % weights.granularity.columns:
            raise QuantizationError(
                f"{entry.module.name} has {columns} columns, no multiple of its "
                f"{weights.granularity}",
                hint="choose a group size that divides them, or except the module by name",
            )
