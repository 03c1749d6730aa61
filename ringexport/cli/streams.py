"""The standard streams of the process: closed ones, full disks, readers that have gone."""

import errno
import io
import os
import signal
import sys

__all__ = ["drop_stdout", "prepare_streams", "stdout_problem"]

_OUTPUT_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}


class _ClosedStream(io.TextIOBase):
    """Stands in for a stdout that the caller has closed: fails when something is written."""

    def write(self, text: str) -> int:
        """Refuse the text."""
        del text
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def prepare_streams() -> None:
    """Fill closed descriptors, write what cannot be encoded as escapes, and allow Ctrl-C.

    A closed descriptor 1 or 2 would otherwise be given to the next file that is opened, and
    libraries that print would write into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
    if sys.stdout is None:
        sys.stdout = _ClosedStream()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123 (until the end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stdout_problem(error: OSError) -> str | None:
    """Return why stdout could not be written, None if the error is about something else.

    Errors about files carry their names; those of streams that are open already do not.
    """
    if error.filename is not None or error.errno not in _OUTPUT_ERRNOS:
        return None
    if error.errno == errno.EBADF:
        return "it is closed"
    return (error.strerror or str(error)).lower()


def drop_stdout() -> None:
    """Send what is still buffered nowhere, so that nothing complains at exit."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):  # not a stream of the system
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
