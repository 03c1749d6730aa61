"""The format of the recurrent state, which no field of config.json tells.

`ringexport quantize` writes it to its report beside the weights; other checkpoints mean fp32.
"""

from pathlib import Path

from ringexport.checkpoint.fields import show
from ringexport.errors import CheckpointError
from ringexport.ops.schemes import StateFormat
from ringexport.strict_json import read_object

__all__ = ["REPORT_NAME", "stored_state_format"]

REPORT_NAME = "ringexport_quantization.json"
_LIMIT_BYTES = 1 << 28


def stored_state_format(checkpoint: Path) -> StateFormat:
    """Return the format that the recipe of a checkpoint asks for, fp32 without a report.

    Raises:
        CheckpointError: a report that cannot be read or names no known format.
    """
    path = checkpoint / REPORT_NAME
    if not path.exists():
        return StateFormat.FP32
    report = read_object(path, limit_bytes=_LIMIT_BYTES, error=CheckpointError)
    recipe = report.get("recipe")
    found = recipe.get("recurrent_state", "fp32") if isinstance(recipe, dict) else "fp32"
    if found not in list(StateFormat):
        raise CheckpointError(
            f"{path}: recurrent_state is {show(found)}, expected one of {', '.join(StateFormat)}",
            hint="quantize the checkpoint again",
        )
    return StateFormat(found)
