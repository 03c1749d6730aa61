"""What the tokenizers library raises, as an error of ours."""

from pathlib import Path
from types import TracebackType

from ringexport.errors import CheckpointError

__all__ = ["TOKENIZER_HINT", "TokenizerErrors"]

TOKENIZER_HINT = "copy tokenizer.json and its config files from the original checkpoint again"


class TokenizerErrors:
    """Turns what the library raises inside, plain `Exception`, into a CheckpointError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is Exception:
            raise CheckpointError(
                f"{self._path} is no usable tokenizer: {str(error)[:300]}", hint=TOKENIZER_HINT
            ) from error
