"""Linear attention with a fixed decay per head: recurrent and chunked forms, torch or FLA kernels.

S_t = exp(log_decay) S_(t-1) + k_t v_t^T, o_t = query_scale q_t S_t. Every exponent taken is <= 0,
so no length can overflow; the powers of 1/decay that some kernels use would.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ringexport.errors import BackendUnavailableError, ConfigError
from ringexport.tensors import match

__all__ = ["LinearInputs", "LinearKernel", "chunked", "fla", "plain", "recurrent", "resolve_kernel"]

CHUNK = 64
_LOG = logging.getLogger(__name__)

# The first exp() of a process settles the accuracy of MKL's vector functions. If two threads make
# it at once, one of them can be off by 1e-4 (torch 2.13 on the CPU, about 1 process in 100).
torch.zeros(1).exp()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearInputs:
    """Arguments of every form of the recurrence, which computes in the dtype of `past_state`.

    Tokens that are not `valid` neither decay the state nor add to it; their outputs mean nothing.
    """

    query: Tensor  # [B, T, H, K]
    key: Tensor  # [B, T, H, K]
    value: Tensor  # [B, T, H, V]
    log_decay: Tensor  # [H], natural log per token, <= 0
    past_state: Tensor  # [B, H, K, V] fp32, or fp64 in an fp64 model; never modified
    query_scale: float  # normally K ** -0.5
    valid: Tensor | None = None  # [B, T] bool; None: all

    def prepared(self) -> "LinearInputs":
        """Return a copy in the state's dtype, key and value 0 where not valid, or ShapeError."""
        dims = match("query", self.query, "B T H K")
        dims = match("key", self.key, "B T H K", dims)
        dims = match("value", self.value, "B T H V", dims)
        dims = match("past_state", self.past_state, "B H K V", dims)
        match("log_decay", self.log_decay, "H", dims)
        tensors = (self.query, self.key, self.value, self.log_decay)
        query, key, value, decay = (tensor.to(self.past_state.dtype) for tensor in tensors)
        if self.valid is not None:
            match("valid", self.valid, "B T", dims)
            padding = ~self.valid[:, :, None, None]
            key, value = key.masked_fill(padding, 0.0), value.masked_fill(padding, 0.0)
        return replace(self, query=query, key=key, value=value, log_decay=decay)


LinearKernel = Callable[[LinearInputs], tuple[Tensor, Tensor]]  # output [B, T, H, V], new state


def recurrent(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
    """Run token by token; any T; output and state in the state's dtype."""
    x = inputs.prepared()
    state, outputs = x.past_state, [x.value[:, :0]]
    for token in range(x.query.shape[1]):
        step = x.log_decay if x.valid is None else x.log_decay * x.valid[:, token, None]
        added = x.key[:, token, :, :, None] * x.value[:, token, :, None, :]
        # exp() of a slow head's decay is off by up to 1.5e-4 of its log; expm1() is not.
        state = state + torch.addcmul(added, step.expm1()[..., None, None], state)
        read = x.query[:, token, :, None, :] @ state  # [B, H, 1, V]
        outputs.append(read.transpose(1, 2) * x.query_scale)
    return torch.cat(outputs, dim=1), state


def chunked(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
    """Run in chunks of 64 tokens; any T; output and state in the state's dtype."""
    x = inputs.prepared()
    valid = x.query.new_ones(x.query.shape[:2]) if x.valid is None else x.valid
    decay = x.log_decay[:, None, None]
    state, outputs = x.past_state, [x.value[:, :0]]
    for start in range(0, x.query.shape[1], CHUNK):
        tokens = slice(start, start + CHUNK)
        query, key, value = (t[:, tokens].transpose(1, 2) for t in (x.query, x.key, x.value))
        # Counts of tokens are exact, so every exponent rounds once; later tokens weigh nothing.
        count = valid[:, None, tokens, None].cumsum(2)  # [B, 1, C, 1]
        between = ((count - count.mT) * decay).masked_fill(count < count.mT, -torch.inf)
        read = (query @ key.mT * between.exp()) @ value + query * (count * decay).exp() @ state
        outputs.append(read.transpose(1, 2) * x.query_scale)
        kept_key = key * ((count[:, :, -1:] - count) * decay).exp()
        state = (count[:, :, -1:] * decay).exp() * state + kept_key.mT @ value
    return torch.cat(outputs, dim=1), state


def plain(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
    """Run in torch on any device: the recurrent step for one token, chunks for more."""
    return recurrent(inputs) if inputs.query.shape[1] == 1 else chunked(inputs)


def fla(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
    """Run flash-linear-attention's simple-GLA kernels: bf16 operands and output, fp32 state.

    Recurrent up to 64 tokens and chunked above, as in the published Hugging Face code.
    """
    kernels = importlib.import_module("fla.ops.simple_gla")
    x = inputs.prepared()
    short = x.query.shape[1] <= CHUNK
    output, state = (kernels.fused_recurrent_simple_gla if short else kernels.chunk_simple_gla)(
        *(tensor.to(torch.bfloat16).contiguous() for tensor in (x.query, x.key, x.value)),
        g_gamma=x.log_decay if x.valid is None else None,
        g=None if x.valid is None else x.log_decay * x.valid[:, :, None],
        scale=x.query_scale,
        initial_state=x.past_state.contiguous(),
        output_final_state=True,
    )
    return output, state


def resolve_kernel(requested: str | None, device: torch.device, dtype: torch.dtype) -> LinearKernel:
    """Return the kernel "torch" or "fla"; None chooses FLA for bf16 on a GPU that has it.

    FLA takes fp32 operands as TF32, so it serves bf16 only. Raises ConfigError for a name or a
    place that does not fit, BackendUnavailableError if FLA was requested and is not installed.
    """
    serves = device.type == "cuda" and dtype == torch.bfloat16
    if requested not in {None, "torch", "fla"} or (requested == "fla" and not serves):
        got = f"{requested!r} for {dtype} on {device.type}"
        raise ConfigError(f"kernels is {got}, expected 'torch'", hint="'fla': bfloat16 on cuda")
    installed = serves and importlib.util.find_spec("fla") is not None
    if requested == "fla" and not installed:
        raise BackendUnavailableError("fla is not installed", hint="pip install 'ringexport[gpu]'")
    chosen = fla if installed and requested != "torch" else plain
    _LOG.info("linear attention runs on the %s kernels", "fla" if chosen is fla else "torch")
    return chosen
