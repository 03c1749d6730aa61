"""The whole network in torch: the reference that every engine is compared with."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ringexport.checkpoint import CheckpointWeights, RingConfig
from ringexport.errors import ShapeError
from ringexport.model.layers import Step, block, rms_norm, routed_experts
from ringexport.model.linear_attention import resolve_kernel
from ringexport.model.state import ReferenceState, TokenLayout
from ringexport.ops.decay import DecayIndex, log_decay
from ringexport.ops.rotary import rotary_tables

__all__ = ["ReferenceModel"]


class ReferenceModel:
    """Ring-linear in torch: norms, router, recurrent state and logits fp32 in every dtype.

    Args:
        config, weights: an open checkpoint, read once, tensor by tensor; NaN in it is an error.
        decay_index: which of the contested layer indices the decay uses.
        dtype: of matrices, activations and KV cache: float32, bfloat16, or float64, which also
            widens to fp64 what is fp32 otherwise.
        device, kernels: see `resolve_kernel`, also for the errors.
    """

    def __init__(
        self,
        config: RingConfig,
        weights: CheckpointWeights,
        *,
        decay_index: DecayIndex = DecayIndex.SERVING,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        kernels: str | None = None,
    ) -> None:
        self.config, self.decay_index, self.dtype = config, decay_index, dtype
        self.device = torch.device(device)
        self._wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._kernel = resolve_kernel(kernels, self.device, dtype)
        self._step = partial(Step, config=config, experts=routed_experts)
        tables = rotary_tables(config.inv_freq(), config.attention_factor, config.context_length)
        self._rotary = [torch.from_numpy(t).to(self.device, self._wide) for t in tables]
        # Logits are fp32, so their weights are too; a tied embedding is stored once, that way.
        tied = config.tie_word_embeddings
        self._embedding = self._load(weights, "model.word_embeddings.weight", wide=tied)
        self._layers = [self._layer(weights, layer) for layer in range(config.num_hidden_layers)]
        self._norm = self._load(weights, "model.norm.weight", wide=True)
        self._head = self._embedding if tied else self._load(weights, "lm_head.weight", wide=True)

    def new_state(self, batch: int) -> ReferenceState:
        """Return the state of `batch` empty sequences."""
        config, dim = self.config, self.config.head_dim
        zeros = self._empty(batch, config.num_attention_heads, dim, dim, wide=True).zero_()
        cache = self._empty(batch, config.num_key_value_heads, 0, dim)
        return ReferenceState(
            position=torch.zeros(batch, dtype=torch.int64),
            recurrent_state={layer: zeros.clone() for layer in config.linear_layers},
            kv_cache=dict.fromkeys(config.softmax_layers, (cache, cache)),
            context_length=config.context_length,
        )

    @torch.no_grad()
    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor | None,
        state: ReferenceState,
        *,
        every_position: bool = False,
        taps: dict[str, Tensor] | None = None,
        padding: str = "right",
    ) -> Tensor:
        """Append tokens to the sequences of `state` and return logits.

        Args:
            tokens: int64 [B, T]; the values at padding do not matter.
            lengths: [B], real tokens of each row, 0..T; None: all T. A row of 0 is left alone.
            state: updated in place.
            every_position: return the logits of all tokens instead of each row's last.
            taps: if given, receives "hidden.{i}" [B, T, D] after each layer, "hidden.final" after
                the final norm (0 at padding) and "expert_ids.{i}" int64 [B, T, k] (-1 at padding).
            padding: "right" or "left", the side of the padding within a row.

        Returns:
            fp32 (fp64 in an fp64 model) [B, vocab] or [B, T, vocab]; 0 where there is no token.

        Raises:
            ShapeError, ContextLengthError: sizes or ids that do not fit; the state is unchanged.
        """
        config = self.config
        if tokens.ndim != 2 or tokens.shape[0] != state.batch:
            raise ShapeError(f"tokens is {list(tokens.shape)}, expected [B={state.batch}, T]")
        layout = TokenLayout.build(tokens.shape[1], lengths, state.position, padding, self.device)
        ids = layout.pack(tokens.to(self.device))
        if ((ids < 0) | (ids >= config.vocab_size)).any():
            raise ShapeError(f"tokens holds ids outside 0..{config.vocab_size - 1}")
        state.check_room(layout)
        hidden = F.embedding(ids, self._embedding).to(self.dtype)
        cos, sin = (table[layout.position] for table in self._rotary)
        step = self._step(layout=layout, cos=cos, sin=sin, state=state, kernel=self._kernel)
        for layer, weights in enumerate(self._layers if ids.numel() else ()):
            hidden, expert_ids = block(layer, weights, hidden, step)
            if taps is not None:
                taps[f"hidden.{layer}"] = layout.unpack(hidden)
                if expert_ids is not None:
                    taps[f"expert_ids.{layer}"] = layout.unpack(expert_ids, fill=-1)
        state.position = state.position + layout.lengths
        hidden = rms_norm(hidden, self._norm, config.rms_norm_eps).to(self.dtype)
        if taps is not None:
            taps["hidden.final"] = layout.unpack(hidden)
        if every_position:
            return layout.unpack(F.linear(hidden.to(self._wide), self._head))
        rows = layout.lengths.nonzero()[:, 0].to(self.device)
        last = layout.lengths.cumsum(0).to(self.device)[rows] - 1
        logits = self._empty(layout.batch, config.vocab_size, wide=True).zero_()
        logits[rows] = F.linear(hidden[last].to(self._wide), self._head)
        return logits

    def _layer(self, weights: CheckpointWeights, layer: int) -> dict[str, Tensor]:
        """Load one layer: the names below its prefix, as layers.py describes them."""
        config, prefix = self.config, f"model.layers.{layer}."
        loaded = {}
        if config.is_linear_layer(layer):
            heads, layers = config.num_attention_heads, config.num_hidden_layers
            decay = log_decay(heads, layer, layers, self.decay_index)
            loaded["log_decay"] = torch.from_numpy(decay).to(self.device)
        mlps = {"mlp.": [prefix + "mlp."]}
        if config.is_moe_layer(layer):
            loaded["mlp.gate.expert_bias"] = self._empty(config.num_experts, wide=True).zero_()
            shared = "mlp.shared_experts."
            mlps = {shared: [prefix + shared]}
            mlps["mlp.experts."] = [f"{prefix}mlp.experts.{e}." for e in range(config.num_experts)]
        for name, members in mlps.items():
            loaded[name + "gate_up"], loaded[name + "down"] = self._stacked(weights, members)
        for name in weights.names():
            key = name.removeprefix(prefix)
            stacked = key.startswith("mlp.") and key.endswith("_proj.weight")
            if key != name and not stacked:
                wide = key.startswith("mlp.gate.") or "norm" in key
                loaded[key] = self._load(weights, name, wide=wide)
        return loaded

    def _stacked(self, weights: CheckpointWeights, mlps: list[str]) -> tuple[Tensor, Tensor]:
        """Return gate and up rows [E, 2 * I, D], and down [E, D, I], of the MLPs named `mlps`."""
        inner, outer = weights.info(mlps[0] + "gate_proj.weight").shape
        gate_up = self._empty(len(mlps), 2 * inner, outer)
        down = self._empty(len(mlps), outer, inner)
        for index, mlp in enumerate(mlps):
            gate_up[index, :inner] = self._load(weights, mlp + "gate_proj.weight")
            gate_up[index, inner:] = self._load(weights, mlp + "up_proj.weight")
            down[index] = self._load(weights, mlp + "down_proj.weight")
        return gate_up, down

    def _load(self, weights: CheckpointWeights, name: str, *, wide: bool = False) -> Tensor:
        values = torch.from_numpy(weights.read_f32(name))
        return values.to(self.device, self._wide if wide else self.dtype)

    def _empty(self, *shape: int, wide: bool = False) -> Tensor:
        return torch.empty(shape, dtype=self._wide if wide else self.dtype, device=self.device)
