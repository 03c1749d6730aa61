"""``python -m ringexport``, and where the installed command starts."""

import os
import signal
from types import FrameType

EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line; Ctrl-C while it is still being imported ends it quietly."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
    from ringexport.cli.main import main as run  # noqa: PLC0415 (after the line above)

    run()


def _leave(number: int, frame: FrameType | None) -> None:
    """End the process: nothing has been opened or written yet."""
    del number, frame
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
