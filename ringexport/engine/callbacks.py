"""What TensorRT calls back: its log, the progress of a build, and the stream of the engine.

The classes derive from classes of the flavour's module, so they are made by functions.
"""

import logging
import threading
from typing import Any, BinaryIO, Protocol

from ringexport.engine.flavor import TensorRt
from ringexport.progress import Progress

__all__ = ["MessageLog", "make_log", "make_monitor", "make_writer"]

log = logging.getLogger(__name__)


class MessageLog(Protocol):
    """A log that TensorRT writes to.

    Attributes:
        errors: what it called errors, oldest first.
    """

    errors: list[str]


def make_log(tensorrt: TensorRt) -> Any:
    """Return a `MessageLog`: errors are kept, everything else goes to our log."""
    trt = tensorrt.module
    levels = {
        trt.ILogger.Severity.WARNING: logging.DEBUG,  # advice about the graph, not for users
        trt.ILogger.Severity.INFO: logging.DEBUG,
    }

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]  # the module has no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in {trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR}:
                self.errors.append(message.strip())
                log.debug("%s: %s", tensorrt.flavor.name, message)
            elif severity in levels:
                log.log(levels[severity], "%s: %s", tensorrt.flavor.name, message)

    return Log()


def make_monitor(
    tensorrt: TensorRt, stage: str, progress: Progress, cancelled: threading.Event
) -> Any:
    """Return what shows the outermost phase of a build as progress of `stage`, and can end it.

    Args:
        tensorrt: the loaded flavour.
        stage: what is built.
        progress: told about the steps.
        cancelled: once it is set, the build ends at the next step of any phase.
    """
    trt = tensorrt.module

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._outermost: str | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None and self._outermost is None:
                self._outermost = phase
                progress.start(stage, steps, "steps")

        def step_complete(self, phase: str, step: int) -> bool:
            del step
            if phase == self._outermost:
                progress.advance()
            return not cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            if phase == self._outermost:
                self._outermost = None

    return Monitor()


def make_writer(tensorrt: TensorRt, file: BinaryIO) -> Any:
    """Return a stream that writes an engine to `file` piece by piece, None if there is none."""
    trt = tensorrt.module
    if not hasattr(trt, "IStreamWriter"):
        return None

    class Writer(trt.IStreamWriter):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.error: OSError | None = None

        def write(self, data: Any) -> int:
            try:
                return file.write(data)
            except OSError as error:
                self.error = error
                return 0

    return Writer()
