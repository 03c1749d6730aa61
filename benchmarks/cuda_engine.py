"""Correctness, speed, memory and start-up of the fast engine on this machine's GPU.

python benchmarks/cuda_engine.py agree [RECIPE...]    full-size logits against the reference
python benchmarks/cuda_engine.py drift                states after 4,096 steps
python benchmarks/cuda_engine.py text                 ring-nano's text against the CPU's
python benchmarks/cuda_engine.py conformance          the conformance suite
python benchmarks/cuda_engine.py docs [RECIPE...]     decode, prompts, where the time goes
python benchmarks/cuda_engine.py flat [RECIPE...]     time of each of 4,096 tokens
python benchmarks/cuda_engine.py flash                Ring-flash in FP8
python benchmarks/cuda_engine.py memory [RECIPE...]   planned and measured bytes
python benchmarks/cuda_engine.py start [FOLDER]       seconds until the first token; 17 GB of disk
                                                      in FOLDER/engine, which must not exist
python benchmarks/cuda_engine.py long                 a context of 524,288 tokens by YaRN
python benchmarks/cuda_engine.py sweep fp8 1,8        crossovers between the ways to compute

Each but the last writes its tables of docs/performance.md and docs/numerics.md; `docs` checks the
logits before it measures and writes gpu-agreement of numerics.md, as `agree` does. Rows of recipes
that were not asked for stay. `start` writes FOLDER/engine, which must not exist, and deletes it.
Single points are measured by `ringexport bench --random-weights CONFIG.json`.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import engine_checks
import engine_room
import engine_speed
from engine_setup import gpu, numbers

from ringexport.errors import RingExportError

_IMPORTED = time.time()

Command = Callable[[Sequence[str], Path], None]
COMMANDS: dict[str, Command] = {
    "agree": lambda args, _: engine_checks.agree(gpu(), args or ("bf16", "fp8", "int8")),
    "drift": lambda _, folder: engine_checks.drift(gpu(), folder),
    "text": lambda _, folder: engine_checks.text(gpu(), folder),
    "conformance": lambda *_: engine_checks.conformance(),
    "docs": lambda args, _: engine_speed.docs(gpu(), args),
    "flat": lambda args, _: engine_speed.flat(gpu(), args or ("fp8",)),
    "flash": lambda *_: engine_speed.flash(gpu()),
    "memory": lambda args, _: engine_room.memory(gpu(), args or ("fp8", "fp8-all", "bf16")),
    "start": lambda args, folder: engine_room.start(Path(*args[:1] or [folder]) / "engine"),
    "open-once": lambda args, _: engine_room.open_once(Path(args[0]), _IMPORTED),
    "long": lambda *_: engine_room.long_context(gpu()),
    "sweep": lambda args, _: engine_speed.sweep(gpu(), args[0], numbers(args[1])),
}
"""By name; "open-once" is the process that `start` measures."""
_ANY = sys.maxsize
TAKES = {
    "agree": (0, _ANY),
    "docs": (0, _ANY),
    "flat": (0, _ANY),
    "memory": (0, _ANY),
    "start": (0, 1),
    "open-once": (1, 1),
    "sweep": (2, 2),
}
"""Command to how many arguments it takes at least and at most; the others take none."""


def main(arguments: Sequence[str]) -> None:
    """Run the command line; an unknown command or a wrong number of arguments shows the usage.

    Raises:
        RingExportError: no GPU, no memory, wrong results, or arguments that mean nothing.
    """
    name, *rest = arguments or [""]
    least, most = TAKES.get(name, (0, 0))
    if name not in COMMANDS or not least <= len(rest) <= most:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        COMMANDS[name](rest, Path(folder))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RingExportError as error:
        sys.exit(str(error))
