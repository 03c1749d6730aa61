"""Inputs and outputs of the streaming model: what its config declares and its page explains."""

from dataclasses import dataclass

from ringexport.triton.pbtxt import EnumName, Message, Value

__all__ = ["INPUTS", "OUTPUTS", "TensorSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor.

    Attributes:
        name: of the tensor.
        data_type: Triton's name of the dtype, without TYPE_.
        dims: shape; -1 is any length.
        meaning: for people.
    """

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)
    meaning: str

    def to_config(self, *, is_input: bool) -> Message:
        """Return the entry of config.pbtxt."""
        entry: dict[str, Value] = {
            "name": self.name,
            "data_type": EnumName(f"TYPE_{self.data_type}"),
            "dims": self.dims,
        }
        if is_input:
            entry["optional"] = True
        return entry


INPUTS = (
    TensorSpec(name="text_input", data_type="STRING", meaning="the prompt as a text"),
    TensorSpec(
        name="input_ids", data_type="INT64", dims=(-1,), meaning="the prompt as token ids instead"
    ),
    TensorSpec(
        name="messages",
        data_type="STRING",
        meaning='a whole chat instead, as JSON: `[{"role": "user", "content": "..."}]`',
    ),
    TensorSpec(
        name="thinking",
        data_type="BOOL",
        meaning="whether the model thinks in a chat; default true",
    ),
    TensorSpec(
        name="stream",
        data_type="BOOL",
        meaning="a response for each piece; without it one response with everything",
    ),
    TensorSpec(name="max_new_tokens", data_type="INT32", meaning="tokens at most; default 256"),
    TensorSpec(name="temperature", data_type="FP64", meaning="default 0: the most likely token"),
    TensorSpec(name="top_k", data_type="INT32", meaning="keep the k most likely; 0 keeps all"),
    TensorSpec(name="top_p", data_type="FP64", meaning="keep the most likely up to this sum"),
    TensorSpec(
        name="min_p", data_type="FP64", meaning="keep those at least so likely beside the best"
    ),
    TensorSpec(name="repetition_penalty", data_type="FP64", meaning="1 does nothing"),
    TensorSpec(name="seed", data_type="INT64", meaning="the same seed gives the same text"),
    TensorSpec(name="stop", data_type="STRING", dims=(-1,), meaning="texts that end the answer"),
    TensorSpec(name="ignore_eos", data_type="BOOL", meaning="go on after a stop token"),
    TensorSpec(
        name="skip_special_tokens", data_type="BOOL", meaning="leave special tokens out of the text"
    ),
)

OUTPUTS = (
    TensorSpec(name="text_output", data_type="STRING", meaning="the next piece of the text"),
    TensorSpec(
        name="token_ids", data_type="INT64", dims=(-1,), meaning="the tokens chosen for this piece"
    ),
    TensorSpec(
        name="finish_reason",
        data_type="STRING",
        meaning="empty until the last response, then `stop_token`, `stop_text`, `length` (of"
        " max_new_tokens), `context` (it is full) or `session_end`",
    ),
    TensorSpec(
        name="prompt_tokens",
        data_type="INT32",
        meaning="tokens before the answer, with the session's",
    ),
    TensorSpec(name="completion_tokens", data_type="INT32", meaning="tokens chosen so far"),
    TensorSpec(
        name="cached_tokens",
        data_type="INT32",
        meaning="tokens before the answer that were not computed again; in the last response",
    ),
)
