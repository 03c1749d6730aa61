"""flash-linear-attention's kernels in a process of their own, timed when the caller says so.

    python benchmarks/kernels_fla.py   compiles what its tuner tries, once, in several processes

Importing it takes 18 s, and its tuner compiles about 50 variants for a minute when Triton's cache
on disk is empty. So the import runs beside whatever the caller does, and a time limit bounds
the rest: shapes that were not reached have no figure. It tunes at the longest prompt, and anew in
each process: binaries come from the cache, choices do not, for the GPU may have been busy then.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVER = Path(__file__).with_name("kernels_fla_server.py")
Shape = tuple[int, int, int]
"""Rows, tokens of each, layer (its decay)."""


def _start(*arguments: object, **pipes: int) -> subprocess.Popen[str]:
    more = {
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "FLA_CACHE_RESULTS": "0",  # choices of another process
    }
    command = [sys.executable, "-W", "ignore", SERVER, *arguments]
    return subprocess.Popen(
        [str(part) for part in command], env=os.environ | more, text=True, **pipes
    )


class Reference:
    """The process; `times` lets it begin."""

    def __init__(self) -> None:
        self._process = _start("serve", stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def times(self, shapes: Iterable[Shape], seconds: float) -> dict[Shape, float]:
        """Return microseconds by shape, of those that were timed within `seconds`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        found: dict[Shape, float] = {}
        timer = threading.Timer(seconds, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(list(shapes)) + "\n")
            self._process.stdin.close()
            for line in self._process.stdout:
                shape, us = json.loads(line)
                found[tuple(shape)] = us
        except BrokenPipeError:
            pass  # it said on stderr why it ended
        finally:
            timer.cancel()
            self._process.stdout.close()
            self._process.wait()
        return found

    def close(self) -> None:
        """End the process if it was not needed."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


if __name__ == "__main__":
    parts = min(8, os.cpu_count() or 1)
    processes = [_start("compile", part, parts) for part in range(parts)]
    sys.exit(max(process.wait() for process in processes))
