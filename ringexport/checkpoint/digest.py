"""The digest of a checkpoint: what calibration stats and quantized weights belong to."""

import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from ringexport.checkpoint.weights import CheckpointWeights
from ringexport.errors import CheckpointError
from ringexport.files import sha256_of

__all__ = ["checkpoint_digest", "weight_bytes"]

_MAX_THREADS = 4
_WEIGHTS_SUFFIX = ".safetensors"


def checkpoint_digest(
    weights: CheckpointWeights, *, advance: Callable[[int], None] | None = None
) -> str:
    """Return SHA-256 over the config as it was understood and all weight files, hexadecimal.

    Tokenizer, generation settings and the index do not count.

    Args:
        weights: an open checkpoint.
        advance: called with the number of bytes read, from one thread at a time.

    Raises:
        CheckpointError: a file cannot be read.
    """
    config = json.dumps(asdict(weights.config), sort_keys=True)
    digest = hashlib.sha256(config.encode())
    files = sorted(path for path in weights.files() if path.suffix == _WEIGHTS_SUFFIX)
    lock = threading.Lock()

    def count(amount: int) -> None:
        with lock:
            if advance is not None:
                advance(amount)

    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        try:
            parts = list(pool.map(lambda path: sha256_of(path, count), files))
        except OSError as failure:
            raise CheckpointError(
                f"cannot read {failure.filename}: {failure.strerror}"
            ) from failure
    for part in parts:
        digest.update(bytes.fromhex(part))
    return digest.hexdigest()


def weight_bytes(weights: CheckpointWeights) -> int:
    """Return the size of all weight files, which is what `checkpoint_digest` reads."""
    return sum(path.stat().st_size for path in weights.files() if path.suffix == _WEIGHTS_SUFFIX)
