"""Turn Ring-linear hybrid MoE checkpoints into verified engine bundles and run them.

Importing this package loads nothing heavy: the public names are imported when they are used.
"""

import importlib
from typing import TYPE_CHECKING

from ringexport.version import __version__

if TYPE_CHECKING:
    from ringexport import errors
    from ringexport.errors import RingExportError
    from ringexport.runtime.sampling import SamplingParams
    from ringexport.runtime.session import Engine, GenerationResult, Session

__all__ = [
    "Engine",
    "GenerationResult",
    "RingExportError",
    "SamplingParams",
    "Session",
    "__version__",
    "errors",
]


def __getattr__(name: str) -> object:
    """Import a public name on its first use (PEP 562)."""
    homes = {
        "Engine": "ringexport.runtime.session",
        "GenerationResult": "ringexport.runtime.session",
        "RingExportError": "ringexport.errors",
        "SamplingParams": "ringexport.runtime.sampling",
        "Session": "ringexport.runtime.session",
    }
    if name == "errors":
        return importlib.import_module("ringexport.errors")
    if name not in homes:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(homes[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
