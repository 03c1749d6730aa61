"""The one place that imports onnxruntime: without telemetry, and without warnings on stderr."""

from typing import Any

from ringexport.settings import forbid_onnxruntime_telemetry

__all__ = ["import_onnxruntime"]

_FATAL = 4


def import_onnxruntime() -> Any:
    """Return the module onnxruntime.

    Its official packages send usage data unless they are told not to, in the environment before
    the import and by a call after it. Errors are raised; stderr belongs to the command line.

    Raises:
        ImportError: it is not installed, or cannot be loaded.
    """
    forbid_onnxruntime_telemetry()
    import onnxruntime  # noqa: PLC0415, TID251 - after the environment

    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(_FATAL)
    return onnxruntime
