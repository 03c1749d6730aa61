"""Names of TensorRT targets: a flavour and the GPU architectures that the engine is for."""

import re
from dataclasses import dataclass
from typing import Self

from ringexport.errors import ConfigError

__all__ = ["FP8_ARCHITECTURE", "PLUGIN_ARCHITECTURES", "EngineTarget"]

FP8_ARCHITECTURE = 89
"""The first for which TensorRT compiles FP8, in whatever layer."""

PLUGIN_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities, times ten, that the kernels of plugins/ are written for."""

ARCHITECTURES = {
    "tensorrt": PLUGIN_ARCHITECTURES,
    "tensorrt-rtx": (80, 86, 89, 120),
}
"""Flavour to what its engines run on; TensorRT-RTX refuses 9.0 and 10.0."""

_NAME = re.compile(r"(tensorrt|tensorrt-rtx):(sm_[1-9][0-9]{1,2}(?:\+sm_[1-9][0-9]{1,2})*)")


@dataclass(frozen=True, slots=True)
class EngineTarget:
    """A target such as ``tensorrt-rtx:sm_89`` or ``tensorrt-rtx:sm_80+sm_89+sm_120``.

    Attributes:
        flavor: "tensorrt" or "tensorrt-rtx".
        architectures: compute capabilities times ten, ascending.
    """

    flavor: str
    architectures: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Read the name of a target; None if it is of another family.

        Raises:
            ConfigError: a TensorRT target that cannot exist.
        """
        if name.partition(":")[0] not in ARCHITECTURES:
            return None
        found = _NAME.fullmatch(name)
        if found is None:
            flavor, _, rest = name.partition(":")
            several = f", or {flavor}:sm_80+sm_89 for one engine for several"
            raise ConfigError(
                f"the target {name[:80]!r} names no architectures"
                + (f" that can be read: {rest[:80]!r}" if rest else ""),
                hint=f"write {flavor}:sm_89{several if flavor == 'tensorrt-rtx' else ''}",
            )
        numbers = [int(part.removeprefix("sm_")) for part in found[2].split("+")]
        target = cls(found[1], tuple(sorted(set(numbers))))
        target._check(len(numbers))
        return target

    @property
    def name(self) -> str:
        """The canonical name."""
        return f"{self.flavor}:{'+'.join(f'sm_{number}' for number in self.architectures)}"

    @property
    def has_fp8(self) -> bool:
        """Whether TensorRT has FP8 on every GPU that the engine is for."""
        return min(self.architectures) >= FP8_ARCHITECTURE

    def _check(self, given: int) -> None:
        known = ARCHITECTURES[self.flavor]
        for number in self.architectures:
            if number not in known:
                raise ConfigError(
                    f"{self.flavor} engines of ringexport do not run on sm_{number}",
                    hint=f"choices: {', '.join(f'sm_{one}' for one in known)}",
                )
        if given != len(self.architectures):
            raise ConfigError(
                f"the target {self.name} names an architecture twice", hint="name each once"
            )
        if self.flavor == "tensorrt" and len(self.architectures) > 1:
            raise ConfigError(
                f"a tensorrt engine is for one architecture, {self.name} names"
                f" {len(self.architectures)}",
                hint="give --target once for each, or use tensorrt-rtx",
            )
