"""The reference model one layer at a time: weights of one layer, activations of all samples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ringexport.checkpoint import CheckpointWeights
from ringexport.model.layers import Step, Weights, block, rms_norm, routed_experts
from ringexport.model.network import ReferenceModel
from ringexport.model.state import ReferenceState, TokenLayout
from ringexport.ops.decay import DecayIndex

__all__ = ["Batch", "LayerResult", "LayerStream", "batches_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Consecutive samples that run together.

    Attributes:
        lengths: int64 [B], tokens of each sample.
        start, stop: their tokens among the packed tokens of all samples.
    """

    lengths: Tensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerResult:
    """What one layer made of one batch.

    Attributes:
        hidden: [N, D], the residual stream after the layer.
        expert_ids: int64 [N, k], None for dense layers.
        key, value: fp [N, Hkv, D] as they are cached, None for linear layers.
        recurrent_state: [B, H, K, V] after the last token of each sample, None for softmax layers.
    """

    hidden: Tensor
    expert_ids: Tensor | None
    key: Tensor | None
    value: Tensor | None
    recurrent_state: Tensor | None


def batches_of(lengths: Sequence[int], batch_tokens: int) -> Iterator[Batch]:
    """Yield batches of at most `batch_tokens` tokens, padding counted; a longer sample is alone.

    Args:
        lengths: tokens of each sample, all more than 0.
        batch_tokens: bound on samples x longest sample.
    """
    first, start = 0, 0
    while first < len(lengths):
        last, longest = first + 1, lengths[first]
        while last < len(lengths):
            longest = max(longest, lengths[last])
            if longest * (last + 1 - first) > batch_tokens:
                break
            last += 1
        stop = start + sum(lengths[first:last])
        yield Batch(lengths=torch.tensor(lengths[first:last]), start=start, stop=stop)
        first, start = last, stop


class LayerStream(ReferenceModel):
    """A reference model that holds no layers: the caller asks for one after the other.

    Args:
        weights: an open checkpoint; it has to stay open.
        decay_index: which of the contested layer indices the decay uses.
        dtype: of matrices and activations.
        device: where layers run.
    """

    def __init__(
        self,
        weights: CheckpointWeights,
        *,
        decay_index: DecayIndex,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        config = weights.config
        super().__init__(
            replace(config, num_hidden_layers=0),
            weights,
            decay_index=decay_index,
            dtype=dtype,
            device=device,
        )
        self.config = config
        self._step = partial(Step, config=config, experts=routed_experts)
        self._source = weights

    def load(self, layer: int) -> dict[str, Tensor]:
        """Read the weights of one layer, by their names below its prefix."""
        return self._layer(self._source, layer)

    def forget_embedding(self) -> None:
        """Free the embedding and the output projection, which no layer needs."""
        self._embedding = self._head = self._norm

    def embed(self, ids: Tensor) -> Tensor:
        """Return the residual stream [N, D] of token ids int64 [N] before the first layer."""
        return F.embedding(ids.to(self.device), self._embedding).to(self.dtype)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Return the input of the output projection, [N, D], of the stream after all layers."""
        return rms_norm(hidden, self._norm, self.config.rms_norm_eps).to(self.dtype)

    def run(self, layer: int, weights: Weights, hidden: Tensor, batch: Batch) -> LayerResult:
        """Run one layer on the samples of one batch, each from its first token.

        Args:
            layer: index.
            weights: what `load` returned for it.
            hidden: packed residual stream [N, D] before the layer.
            batch: where the samples are.
        """
        state = self._empty_state(layer, len(batch.lengths))
        width = int(batch.lengths.max())
        layout = TokenLayout.build(width, batch.lengths, state.position, "right", self.device)
        cos, sin = (table[layout.position] for table in self._rotary)
        step = self._step(layout=layout, cos=cos, sin=sin, state=state, kernel=self._kernel)
        hidden, expert_ids = block(layer, weights, hidden, step)
        key = value = None
        if layer in state.kv_cache:
            # Padding has no slot of its own in what is packed: [B, Hkv, S, D] -> [N, Hkv, D].
            caches = (cache[:, :, :width].transpose(1, 2) for cache in state.kv_cache[layer])
            key, value = (layout.pack(cache) for cache in caches)
        return LayerResult(
            hidden=hidden,
            expert_ids=expert_ids,
            key=key,
            value=value,
            recurrent_state=state.recurrent_state.get(layer),
        )

    def _empty_state(self, layer: int, batch: int) -> ReferenceState:
        """Return the state of `batch` empty sequences, for one layer only."""
        config, dim = self.config, self.config.head_dim
        linear = config.is_linear_layer(layer)
        zeros = self._empty(batch, config.num_attention_heads, dim, dim, wide=True).zero_()
        cache = self._empty(batch, config.num_key_value_heads, 0, dim)
        return ReferenceState(
            position=torch.zeros(batch, dtype=torch.int64),
            recurrent_state={layer: zeros} if linear else {},
            kv_cache={} if linear else {layer: (cache, cache)},
            context_length=config.context_length,
        )
