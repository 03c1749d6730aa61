"""Messages of the plugins, which TensorRT does not pass on: they go to the log of this module."""

import ctypes
import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["collected_messages", "listen"]

log = logging.getLogger(__name__)

_LogFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p)
_FindFunction = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)


def listen(library: Path) -> None:
    """Give a loaded plugin library its logger, through the function that it exports for that.

    `ILoggerFinder` and `ILogger` are objects of C++ whose table of functions starts with the one
    that is called.
    """
    ctypes.CDLL(str(library)).setLoggerFinder(ctypes.c_void_p(ctypes.addressof(_objects()[0])))


@contextmanager
def collected_messages() -> Iterator[list[str]]:
    """Yield a list that gets what the plugins say inside the block."""
    messages: list[str] = []
    handler = _Collector(messages)
    log.addHandler(handler)
    try:
        yield messages
    finally:
        log.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


@functools.cache
def _objects() -> tuple[Any, ...]:
    """Return the finder, and everything that has to live as long: the library keeps pointers."""

    def write(_this: int, _severity: int, message: bytes) -> None:
        log.error("%s", message.decode("utf-8", "replace"))

    write_function = _LogFunction(write)
    logger_table = (ctypes.c_void_p * 3)(ctypes.cast(write_function, ctypes.c_void_p).value)
    logger = (ctypes.c_void_p * 1)(ctypes.addressof(logger_table))
    find_function = _FindFunction(lambda _this: ctypes.addressof(logger))
    finder_table = (ctypes.c_void_p * 3)(ctypes.cast(find_function, ctypes.c_void_p).value)
    finder = (ctypes.c_void_p * 1)(ctypes.addressof(finder_table))
    return finder, finder_table, find_function, logger, logger_table, write_function
