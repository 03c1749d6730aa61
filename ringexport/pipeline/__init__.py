"""Chain the stages: a checkpoint and a request become an engine bundle.

Importing this package loads neither numpy nor the stages; `pipeline.build` does.
"""

from ringexport.pipeline.request import (
    AUTO,
    DECAY_INDICES,
    RECIPES,
    BuildRequest,
    resolve,
)

__all__ = ["AUTO", "DECAY_INDICES", "RECIPES", "BuildRequest", "resolve"]
