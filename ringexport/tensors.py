"""Named-dimension shape checks: one line at a border instead of a paragraph of ifs."""

from collections.abc import Mapping
from typing import Protocol

from ringexport.errors import ShapeError

__all__ = ["Shaped", "match"]


class Shaped(Protocol):
    """Anything with a shape: a numpy array, a torch tensor, a lazy weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, outermost first."""


def match(
    name: str, tensor: Shaped, pattern: str, known: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Bind the dimensions of `tensor` to the letters of `pattern` and check them.

    Args:
        name: what to call the tensor in the error message.
        tensor: anything with a `shape`.
        pattern: dimensions by name or number, such as ``"B T H 64"``; ``_`` accepts any size.
        known: dimensions that are already bound; not modified.

    Returns:
        `known` with the dimensions of this tensor added.

    Raises:
        ShapeError: wrong rank, or a dimension that disagrees; the message shows both shapes.
    """
    names = pattern.split()
    bound = dict(known or {})
    shape = tuple(tensor.shape)
    fits = len(shape) == len(names)
    for dim, size in zip(names, shape, strict=False):
        if dim == "_":
            continue
        expected = int(dim) if dim.isdigit() else bound.setdefault(dim, size)
        fits = fits and expected == size
    if not fits:
        wanted = ", ".join(f"{dim}={bound[dim]}" if dim in bound else dim for dim in names)
        raise ShapeError(f"{name} has shape {list(shape)}, expected [{wanted}]")
    return bound
