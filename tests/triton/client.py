"""Ask a model of a server over a gRPC stream, as a user would."""

import queue
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import numpy as np
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

__all__ = ["Answer", "Conversation", "ask", "failure"]

DTYPES = {
    "text_input": "BYTES",
    "input_ids": "INT64",
    "messages": "BYTES",
    "thinking": "BOOL",
    "stream": "BOOL",
    "max_new_tokens": "INT32",
    "temperature": "FP64",
    "top_k": "INT32",
    "top_p": "FP64",
    "seed": "INT64",
    "stop": "BYTES",
    "ignore_eos": "BOOL",
}
NUMPY = {"INT64": np.int64, "INT32": np.int32, "FP64": np.float64, "BOOL": np.bool_}
TIMEOUT_SECONDS = 60.0


@dataclass(slots=True)
class Answer:
    """All responses to a request."""

    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Conversation:
    """One gRPC stream, for one request at a time."""

    def __init__(self, url: str, model: str) -> None:
        self._model = model
        self._responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client = grpc.InferenceServerClient(url)
        self._client.start_stream(callback=self._received)

    def send(
        self, *, session: int | str = 0, start: bool = False, end: bool = False, **values: object
    ) -> None:
        """Send a request; keyword arguments are its input tensors."""
        self._client.async_stream_infer(
            self._model,
            [_tensor(name, value) for name, value in values.items()],
            sequence_id=session,
            sequence_start=start,
            sequence_end=end,
        )

    def read(self) -> Iterator[tuple[Answer, bool]]:
        """Yield the answer so far after each response, and whether Triton says it is final."""
        answer = Answer()
        while not answer.finish_reason:
            result, error = self._responses.get(timeout=TIMEOUT_SECONDS)
            if error is not None:
                raise error
            answer.pieces.append(result.as_numpy("text_output")[0].decode())
            answer.token_ids += result.as_numpy("token_ids").tolist()
            answer.finish_reason = result.as_numpy("finish_reason")[0].decode()
            for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
                setattr(answer, name, int(result.as_numpy(name)[0]))
            parameters = result.get_response().parameters
            yield answer, parameters["triton_final_response"].bool_param

    def ask(self, **request: Any) -> Answer:
        """Send a request and return the complete answer."""
        self.send(**request)
        *_, (answer, final) = self.read()
        assert final
        return answer

    def _received(self, result: Any, error: Any) -> None:
        self._responses.put((result, error))

    def nothing_more(self) -> bool:
        return self._responses.empty()

    def close(self, *, cancel: bool = False) -> None:
        """End the stream; `cancel` cancels the request that runs on it."""
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(cancel=error is not None)


def ask(url: str, model: str, **request: Any) -> Answer:
    """Send one request on a stream of its own."""
    with Conversation(url, model) as conversation:
        return conversation.ask(**request)


def failure(url: str, model: str, **request: Any) -> str:
    """Return the message of a request that must fail."""
    try:
        answer = ask(url, model, **request)
    except InferenceServerException as error:
        return str(error.message())
    raise AssertionError(f"the request was answered: {answer}")


def _tensor(name: str, value: Any) -> grpc.InferInput:
    dtype = DTYPES[name]
    values = value if isinstance(value, list) else [value]
    if dtype == "BYTES":
        array = np.array([text.encode() for text in values], dtype=np.object_)
    else:
        array = np.array(values, dtype=NUMPY[dtype])
    tensor = grpc.InferInput(name, list(array.shape), dtype)
    tensor.set_data_from_numpy(array)
    return tensor
