"""Muon: momentum whose matrix is orthogonalised (Newton-Schulz) before it is applied.

All matrices of one shape are treated in one batch. Attention projections are cut by head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def newton_schulz(x: Tensor) -> Tensor:
    """The orthogonal factor of each matrix of [n, rows, cols] with rows <= cols, roughly."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True).bfloat16() + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Muon:
    def __init__(self, matrices: dict[str, nn.Parameter], head_dim: int, compiled: bool) -> None:
        self.groups: dict[tuple[int, int], list[tuple[nn.Parameter, bool]]] = {}
        self.head_dim = head_dim
        for name, parameter in matrices.items():
            view = self._view(name, parameter.data)
            flip = view.shape[-2] > view.shape[-1]
            rows, cols = sorted(view.shape[-2:])
            self.groups.setdefault((rows, cols), []).append((parameter, flip))
        self.names = {id(p): n for n, p in matrices.items()}
        self.momentum: dict[tuple[int, int], Tensor] = {}
        self.orthogonal = torch.compile(newton_schulz) if compiled else newton_schulz

    def _view(self, name: str, value: Tensor) -> Tensor:
        if name.endswith("query_key_value"):
            return value.view(-1, self.head_dim, value.shape[-1])
        return value if value.dim() == 3 else value.unsqueeze(0)

    @torch.no_grad()
    def step(self, lr: float, decay: float, momentum: float = 0.95) -> None:
        for shape, members in self.groups.items():
            parts = []
            for parameter, flip in members:
                assert parameter.grad is not None
                grad = self._view(self.names[id(parameter)], parameter.grad)
                parts.append(grad.transpose(-1, -2) if flip else grad)
            grads = torch.cat(parts)
            buffer = self.momentum.setdefault(shape, torch.zeros_like(grads))
            buffer.lerp_(grads, 1 - momentum)
            update = self.orthogonal(grads.lerp(buffer, momentum)).float()
            update *= -lr * 0.2 * max(shape) ** 0.5
            start = 0
            for parameter, flip in members:
                view = self._view(self.names[id(parameter)], parameter.data)
                piece = update[start : start + view.shape[0]]
                start += view.shape[0]
                view.mul_(1 - lr * decay).add_(piece.transpose(-1, -2) if flip else piece)
