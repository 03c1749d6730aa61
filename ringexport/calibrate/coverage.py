"""Which experts saw enough tokens, which tokens can be shown to those that did not.

A token may be shown to an expert that it did not choose only if the expert's group is one of the
`topk_group` groups that the router opened for it: then the expert could have been chosen, had its
score been a little higher. It takes the place of the token's last choice, so `num_experts_per_tok`
stays what it is. Groups are never opened, top-k is never raised, and the residual stream goes on
with the true choice: only the observers of the starved expert see such tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ringexport.checkpoint import RingConfig, TensorKind, expected_tensors
from ringexport.errors import CalibrationError
from ringexport.model.layers import Weights, route

__all__ = ["Candidates", "ForcedTokens", "check_blind", "check_complete", "observed_modules"]

_NOBODY = torch.iinfo(torch.int64).max
_RANK_UNIT = 1 << 40  # tokens of one calibration stay far below
_OBSERVED_KINDS = (
    TensorKind.ROUTED_EXPERTS,
    TensorKind.SHARED_EXPERTS,
    TensorKind.DENSE_MLP,
    TensorKind.LINEAR_ATTENTION,
    TensorKind.SOFTMAX_ATTENTION,
    TensorKind.LM_HEAD,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForcedTokens:
    """Tokens to show to starved experts, one expert each.

    Attributes:
        hidden: [M, D], the tokens as experts see them.
        expert_ids: int64 [M, 1].
        counts: int64 [E] on the CPU, how many are for each expert.
    """

    hidden: Tensor
    expert_ids: Tensor
    counts: Tensor


class Candidates:
    """For each expert of a layer, the tokens that came closest to choosing it.

    The closest are those that rank it highest among the experts of their open groups; of equals
    the first token. Only `minimum` tokens per expert are kept, so memory does not grow with the
    number of tokens, and the result does not depend on how they came in batches.

    Args:
        config: sizes and the router's constants.
        minimum: tokens that every expert should see.
    """

    def __init__(self, config: RingConfig, minimum: int) -> None:
        self._config, self._minimum = config, minimum
        open_experts = config.topk_group * config.experts_per_group
        # The experts of the open groups are the best `open_experts`: all others score -inf.
        self._open = replace(config, num_experts_per_tok=open_experts)
        self._keys: Tensor | None = None  # int64 [E, minimum], rank and index of the token
        self._hidden: Tensor | None = None  # [E, minimum, D]
        self.tokens = torch.zeros(config.num_experts, dtype=torch.int64)

    def observe(
        self, hidden: Tensor, weights: Weights, expert_ids: Tensor, first_token: int
    ) -> None:
        """Look at the tokens of one batch.

        Args:
            hidden: [N, D], input of router and experts.
            weights: of the layer.
            expert_ids: int64 [N, k], the experts that the tokens chose.
            first_token: index of the first of them among all tokens.
        """
        count = self._config.num_experts
        self.tokens += expert_ids.flatten().bincount(minlength=count).cpu()
        if self._minimum == 0 or bool((self.tokens >= self._minimum).all()):
            return
        router = weights["mlp.gate.weight"]
        logits = F.linear(hidden.to(router.dtype), router)
        ranked, _ = route(logits, weights["mlp.gate.expert_bias"], self._open)
        place = torch.arange(ranked.shape[1], device=ranked.device)
        token = torch.arange(len(ranked), device=ranked.device)[:, None] + first_token
        keys = torch.full((len(ranked), count), _NOBODY, device=ranked.device)
        keys.scatter_(1, ranked, place * _RANK_UNIT + token)
        keys.scatter_(1, expert_ids, _NOBODY)  # those see the token anyway
        self._keep(keys.T, hidden)

    def forced(self) -> ForcedTokens | None:
        """Return what brings starved experts to the minimum, as far as there are tokens."""
        if self._keys is None or self._hidden is None:
            return None
        missing = (self._minimum - self.tokens).clamp(min=0).to(self._keys.device)
        wanted = torch.arange(self._keys.shape[1], device=missing.device) < missing[:, None]
        expert, slot = (wanted & (self._keys != _NOBODY)).nonzero(as_tuple=True)
        counts = expert.bincount(minlength=len(missing)).cpu()
        hidden = self._hidden[expert, slot]
        return ForcedTokens(hidden=hidden, expert_ids=expert[:, None], counts=counts)

    def _keep(self, keys: Tensor, hidden: Tensor) -> None:
        """Merge the keys [E, N] of a batch into the best that are known."""
        found, index = keys.topk(min(self._minimum, keys.shape[1]), dim=1, largest=False)
        rows = hidden[index]  # [E, m, D]
        if self._keys is not None and self._hidden is not None:
            found = torch.cat((self._keys, found), dim=1)
            rows = torch.cat((self._hidden, rows), dim=1)
        self._keys, best = found.topk(min(self._minimum, found.shape[1]), dim=1, largest=False)
        self._hidden = rows.gather(1, best[..., None].expand(-1, -1, rows.shape[2]))


def observed_modules(config: RingConfig) -> tuple[str, ...]:
    """Return every module that could be quantized, by its name in the checkpoint."""
    names = [
        name.removesuffix(".weight")
        for name, spec in expected_tensors(config).items()
        if spec.kind in _OBSERVED_KINDS
    ]
    return (*names, "lm_head") if config.tie_word_embeddings else tuple(names)


def check_complete(modules: Iterable[str], config: RingConfig) -> None:
    """Check that every module that could be quantized has stats, and nothing else has.

    Args:
        modules: those that have.
        config: of the model.

    Raises:
        CalibrationError: a module without stats, or stats without a module; the message counts
            and names them.
    """
    expected, found = observed_modules(config), set(modules)
    missing = [name for name in expected if name not in found]
    if missing:
        raise CalibrationError(
            f"{len(missing)} of {len(expected)} modules were not observed: {_first(missing)}",
            hint="this is a fault of ringexport: a part of the model bypassed calibration",
        )
    unknown = sorted(found - set(expected))
    if unknown:
        raise CalibrationError(
            f"stats for {len(unknown)} modules that the model does not have: {_first(unknown)}"
        )


def check_blind(blind: Sequence[str], num_experts: int, max_share: float) -> None:
    """Check how many experts of the model no token could be shown to.

    Args:
        blind: names of those experts.
        num_experts: in all layers.
        max_share: of them may be blind, 0..1.

    Raises:
        CalibrationError: more are.
    """
    if len(blind) > max_share * num_experts:
        raise CalibrationError(
            f"{len(blind)} of {num_experts} experts saw no token, at most {max_share:.2%} may: "
            f"{_first(blind)}",
            hint="use more samples or more varied prompts: the router never opened the groups of "
            "these experts",
        )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
