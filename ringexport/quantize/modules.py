"""The modules of a model that can be quantized, and patterns that name them."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate

from ringexport.checkpoint.config import RingConfig
from ringexport.checkpoint.names import TensorKind, expected_tensors
from ringexport.errors import ConfigError

__all__ = [
    "QUANTIZABLE_KINDS",
    "QuantizableModule",
    "check_target",
    "protected_modules",
    "quantizable_modules",
    "select",
]

QUANTIZABLE_KINDS = (
    TensorKind.ROUTED_EXPERTS,
    TensorKind.SHARED_EXPERTS,
    TensorKind.DENSE_MLP,
    TensorKind.LINEAR_ATTENTION,
    TensorKind.SOFTMAX_ATTENTION,
    TensorKind.LM_HEAD,
)
"""Kinds of modules that recipes may select. Router, norms and embedding are never quantized."""

_WEIGHT = ".weight"
_REGEX = "re:"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizableModule:
    """One matrix product of the model.

    Attributes:
        name: as in the checkpoint, without ".weight".
        kind: what it is for.
        shape: [out, in] of its weight.
    """

    name: str
    kind: TensorKind
    shape: tuple[int, int]

    @property
    def weight(self) -> str:
        """The name of its weight in the checkpoint."""
        return self.name + _WEIGHT


def quantizable_modules(config: RingConfig) -> tuple[QuantizableModule, ...]:
    """Return the modules that a recipe may quantize, in the order in which the model uses them."""
    return tuple(
        QuantizableModule(
            name=name.removesuffix(_WEIGHT), kind=spec.kind, shape=(spec.shape[0], spec.shape[1])
        )
        for name, spec in expected_tensors(config).items()
        if spec.kind in QUANTIZABLE_KINDS
    )


def protected_modules(config: RingConfig) -> tuple[str, ...]:
    """Return the modules that may never be quantized: router, norms and embedding."""
    return tuple(
        name.removesuffix(_WEIGHT)
        for name, spec in expected_tensors(config).items()
        if spec.kind not in QUANTIZABLE_KINDS and name.endswith(_WEIGHT)
    )


def check_target(target: str, where: str) -> None:
    """Check the form of a target: a kind, a pattern with ``*`` or dots, or ``re:`` and a regex.

    Raises:
        ConfigError: an unknown kind, one that is never quantized, or a broken expression.
    """
    if target.startswith(_REGEX):
        try:
            re.compile(target.removeprefix(_REGEX))
        except re.error as failure:
            raise ConfigError(f"{where}: {target!r} is no regular expression: {failure}") from None
        return
    kinds = [kind.value for kind in QUANTIZABLE_KINDS]
    if target in kinds or _is_pattern(target):
        return
    if target in list(TensorKind) or target == "norms":
        raise ConfigError(
            f"{where}: {target!r} can never be quantized",
            hint=f"kinds that can: {', '.join(kinds)}",
        )
    nearest = get_close_matches(target[:100], kinds, n=1, cutoff=0.5)
    raise ConfigError(
        f"{where}: {target[:100]!r} is no kind of module, and no pattern of names",
        hint=f"did you mean {nearest[0]!r}?" if nearest else f"kinds: {', '.join(kinds)}",
    )


def select(
    target: str,
    modules: Sequence[QuantizableModule],
    protected: Collection[str],
    where: str,
) -> set[str]:
    """Return the names of the modules that `target` selects.

    A kind that this model lacks selects nothing; a pattern has to match.

    Args:
        target: as `check_target` accepts it.
        modules: to choose from.
        protected: names that can never be chosen.
        where: what to call the place in messages.

    Raises:
        ConfigError: a pattern that matches nothing, or nothing that can be quantized.
    """
    if not _is_pattern(target):
        return {module.name for module in modules if module.kind == target}
    names = [module.name for module in modules]
    chosen = _matches(target, names)
    if chosen:
        return chosen
    forbidden = _matches(target, protected)
    if forbidden:
        raise ConfigError(
            f"{where}: {target!r} selects {min(forbidden)}, which can never be quantized",
            hint="router, norms and embedding keep their precision in every recipe",
        )
    nearest = get_close_matches(target[:100], names, n=1)
    raise ConfigError(
        f"{where}: {target[:100]!r} matches none of the {len(names)} modules",
        hint=f"did you mean {nearest[0]!r}?"
        if nearest
        else "names are those of the checkpoint without '.weight'; * matches any characters",
    )


def _is_pattern(target: str) -> bool:
    return target.startswith(_REGEX) or any(sign in target for sign in ".*?[")  # or a full name


def _matches(target: str, names: Iterable[str]) -> set[str]:
    if target.startswith(_REGEX):
        expression = re.compile(target.removeprefix(_REGEX))
    else:
        expression = re.compile(translate(target))
    return {name for name in names if expression.fullmatch(name)}
