"""The torch reference as a runner: the golden implementation behind the common protocol."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.checkpoint.state_format import stored_state_format
from ringexport.errors import BackendUnavailableError
from ringexport.ops.decay import DecayIndex
from ringexport.ops.schemes import StateFormat
from ringexport.runtime.runner import (
    DEFAULT_PREFILL_CHUNK,
    BaseRunner,
    Logits,
    RunnerSpec,
    Tokens,
    memory_guard,
)
from ringexport.runtime.state import BaseState, StateLayout, StateSnapshot

try:
    import torch

    from ringexport.model.network import ReferenceModel
    from ringexport.model.state import ReferenceState
    from ringexport.runtime.backends.torch_quantized import QuantizedModel
except ImportError as error:  # pragma: no cover - the tests' environment has it
    raise BackendUnavailableError(
        f"the torch backend needs the package torch: {error}",
        hint="pip install 'ringexport[torch]'",
    ) from error

__all__ = ["TorchRunner", "TorchState"]

Array = npt.NDArray[Any]


class _ModelOptions(TypedDict):
    """What both models are built with."""

    decay_index: DecayIndex
    dtype: torch.dtype
    device: str


class TorchState(BaseState):
    """A `ReferenceState` of the reference model.

    Attributes:
        inner: the model's own state; its position always equals `position`.
    """

    def __init__(self, owner: "TorchRunner", inner: ReferenceState) -> None:
        spec = owner.spec
        super().__init__(owner, spec.layout, inner.batch, context_length=spec.context_length)
        self._owner = owner
        self.inner = inner
        self.follow()

    def follow(self) -> None:
        """Take over the position of the model's state after a step."""
        self.position[:] = self.inner.position.numpy()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors, including room for tokens to come."""
        return self.inner.nbytes

    @property
    def model_digest(self) -> str:
        """See `BaseState.model_digest`."""
        return self._owner.model_digest

    def _read_rows(self, rows: list[int], tokens: slice) -> dict[str, Array]:
        """Copy rows; bf16 caches become fp32, which loses nothing."""
        tensors: dict[str, Array] = {
            f"recurrent_state.{layer}": _array(tensor[rows])
            for layer, tensor in self.inner.recurrent_state.items()
        }
        for layer, pair in self.inner.kv_cache.items():
            for part, tensor in zip(("key", "value"), pair, strict=True):
                tensors[f"kv_cache.{layer}.{part}"] = _array(tensor[rows, :, tokens])
        return tensors

    def _write_rows(self, rows: list[int], snapshot: StateSnapshot) -> None:
        inner, used = self.inner, int(snapshot.position.max())
        inner.position[rows] = torch.from_numpy(snapshot.position)
        for layer, tensor in inner.recurrent_state.items():
            tensor[rows] = _tensor(snapshot.tensors[f"recurrent_state.{layer}"], tensor)
        for layer, pair in inner.kv_cache.items():
            key, value = (_with_room(tensor, used) for tensor in pair)
            key[rows, :, :used] = _tensor(snapshot.tensors[f"kv_cache.{layer}.key"], key)
            value[rows, :, :used] = _tensor(snapshot.tensors[f"kv_cache.{layer}.value"], value)
            inner.kv_cache[layer] = (key, value)

    def _copy_rows(self, rows: list[int], source: "TorchState", source_rows: list[int]) -> None:
        inner, other = self.inner, source.inner
        used = int(source.position[source_rows].max())
        inner.position[rows] = other.position[source_rows]
        for layer, tensor in inner.recurrent_state.items():
            tensor[rows] = other.recurrent_state[layer][source_rows]
        for layer, pair in inner.kv_cache.items():
            key, value = (_with_room(tensor, used) for tensor in pair)
            key[rows, :, :used] = other.kv_cache[layer][0][source_rows, :, :used]
            value[rows, :, :used] = other.kv_cache[layer][1][source_rows, :, :used]
            inner.kv_cache[layer] = (key, value)

    def _fork(self, rows: list[int]) -> "TorchState":
        return TorchState(self._owner, self.inner.snapshot(rows))


class TorchRunner(BaseRunner[TorchState]):
    """Runs the reference model; of a quantized checkpoint as an engine does, inputs in 8 bits too.

    Args:
        checkpoint: directory of the checkpoint.
        model_digest: see `BaseRunner`.
        decay_index: which form of the decay.
        dtype: "float32", "bfloat16" or "float64", of matrices and KV cache.
        device: a torch device, such as "cpu" or "cuda".
        threads: threads per operation on the CPU, None for torch's own choice.
        prefill_chunk: tokens per row and call.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be used.
        BackendUnavailableError: torch cannot use the device.
    """

    def __init__(
        self,
        checkpoint: Path,
        *,
        model_digest: Callable[[], str],
        decay_index: DecayIndex = DecayIndex.SERVING,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int | None = None,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    ) -> None:
        self._threads = threads
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise BackendUnavailableError(
                f"the torch backend cannot use {device}: torch sees no CUDA device",
                hint="install a CUDA build of torch, or use the CPU",
            )
        loading = memory_guard(f"the weights of {checkpoint} in {dtype} on {device}")
        with CheckpointWeights.open(checkpoint) as weights, loading:
            config = weights.config
            state_format = stored_state_format(checkpoint)
            options = _ModelOptions(
                decay_index=decay_index, dtype=getattr(torch, dtype), device=device
            )
            self._model: ReferenceModel
            if config.quantization is None and state_format is StateFormat.FP32:
                self._model = ReferenceModel(config, weights, **options)
            else:
                self._model = QuantizedModel(weights, state_format=state_format, **options)
        spec = RunnerSpec(
            name="torch",
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            layout=_layout(config),
            prefill_chunk=prefill_chunk,
        )
        super().__init__(spec, model_digest)

    def probe(
        self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None, state: TorchState
    ) -> dict[str, npt.NDArray[np.generic]]:
        """Feed tokens like `prefill` and return what the layers computed; see `ProbeRunner`.

        Raises:
            ShapeError, ContextLengthError: as for `prefill`.
        """
        ids, sizes = self._check_tokens(tokens, lengths, self._check_state(state))
        taps: dict[str, torch.Tensor] = {}
        logits = self._forward(ids, sizes, state, every_position=True, taps=taps)
        return {name: _array(tensor) for name, tensor in taps.items()} | {"logits": logits}

    def _new_state(self, batch: int) -> TorchState:
        return TorchState(self, self._model.new_state(batch))

    def _prefill_chunk(
        self, tokens: Tokens, lengths: Tokens, state: TorchState, every_position: bool
    ) -> Logits:
        return self._forward(tokens, lengths, state, every_position=every_position)

    def _decode(self, tokens: Tokens, state: TorchState) -> Logits:
        return self._forward(tokens[:, None], None, state)

    def _decode_rows(self, tokens: Tokens, state: TorchState, rows: list[int]) -> Logits:
        padded = np.zeros((state.batch, 1), dtype=np.int64)
        lengths = np.zeros(state.batch, dtype=np.int64)
        padded[rows, 0], lengths[rows] = tokens, 1
        return self._forward(padded, lengths, state)[rows]

    def _forward(
        self,
        tokens: Tokens,
        lengths: Tokens | None,
        state: TorchState,
        *,
        every_position: bool = False,
        taps: dict[str, torch.Tensor] | None = None,
    ) -> Logits:
        with _threads(self._threads):
            logits = self._model.forward(
                torch.from_numpy(np.ascontiguousarray(tokens)),
                None if lengths is None else torch.from_numpy(lengths),
                state.inner,
                every_position=every_position,
                taps=taps,
            )
        state.follow()
        return _array(logits).astype(np.float32, copy=False)

    def _close(self) -> None:
        del self._model


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Use `count` threads inside; torch has only one setting for the whole process."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _layout(config: RingConfig) -> StateLayout:
    heads, size = config.num_attention_heads, config.head_dim
    return StateLayout(
        recurrent=dict.fromkeys(config.linear_layers, (heads, size, size)),
        kv_cache=dict.fromkeys(config.softmax_layers, (config.num_key_value_heads, size)),
    )


def _array(tensor: torch.Tensor) -> Array:
    """Copy a tensor of any device to numpy, which has no bf16."""
    host = tensor.detach().cpu()
    host = host.float() if host.dtype == torch.bfloat16 else host
    return np.array(host.numpy(), order="C")


def _with_room(tensor: torch.Tensor, used: int) -> torch.Tensor:
    """Return a cache [B, Hkv, S, D] with room for `used` tokens."""
    missing = used - tensor.shape[2]
    return tensor if missing <= 0 else torch.nn.functional.pad(tensor, (0, 0, 0, missing))


def _tensor(array: Array, like: torch.Tensor) -> torch.Tensor:
    """Copy an array to the device and dtype of `like`."""
    return torch.from_numpy(array.copy()).to(like.device, like.dtype)
