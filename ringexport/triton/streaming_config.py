"""config.pbtxt of the streaming model: a decoupled model of Triton's Python backend."""

from ringexport.triton.options import TritonOptions
from ringexport.triton.pbtxt import EnumName, Message, Value, to_pbtxt
from ringexport.triton.tensors import INPUTS, OUTPUTS

__all__ = ["COPIED_BUNDLE", "streaming_config"]

COPIED_BUNDLE = "bundle"
"""Where a copied bundle is: inside the version's directory, so that Triton moves it along."""

_HEADER = """\
# Written by ringexport triton. The values of `parameters` may be changed here; names, types and
# shapes may not.
"""


def streaming_config(name: str, bundle: str, options: TritonOptions) -> str:
    """Return the text of config.pbtxt.

    Args:
        name: of the model.
        bundle: path of the bundle, absolute or seen from the version's directory.
        options: how it serves.
    """
    parameters = {
        "bundle": bundle,
        "backend": options.backend,
        "threads": str(options.threads or ""),
        "max_batch": str(options.max_batch),
        "max_sessions": str(options.max_sessions),
        "session_idle_seconds": str(options.session_idle_seconds),
        "FORCE_CPU_ONLY_INPUT_TENSORS": "yes",
    }
    message: dict[str, Value] = {
        "name": name,
        "backend": "python",
        "max_batch_size": 0,
        "model_transaction_policy": {"decoupled": True},
        "input": [spec.to_config(is_input=True) for spec in INPUTS],
        "output": [spec.to_config(is_input=False) for spec in OUTPUTS],
        "instance_group": [_instances(options)],
    }
    if options.sticky:
        message["sequence_batching"] = {
            "max_sequence_idle_microseconds": options.session_idle_seconds * 1_000_000,
            "oldest": {"max_candidate_sequences": options.max_sessions},
        }
    message["parameters"] = [
        {"key": key, "value": {"string_value": value}} for key, value in parameters.items()
    ]
    return _HEADER + to_pbtxt(message)


def _instances(options: TritonOptions) -> Message:
    group: dict[str, Value] = {
        "kind": EnumName("KIND_GPU" if options.gpus else "KIND_CPU"),
        "count": options.instances,
    }
    return group | ({"gpus": options.gpus} if options.gpus else {})
