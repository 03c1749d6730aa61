"""The router kernels against the contract: choice, ties, weights; logits that are no numbers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ringexport.ops.moe import Routing, router
from tests.kernels.moe_cases import EPS
from tests.kernels.support import DTYPES, Guarded, library, workspace

pytestmark = pytest.mark.gpu
RING_MINI = Routing(
    num_experts=256, top_k=8, n_group=8, topk_group=4, normalize=True, routed_scaling_factor=2.5
)
ROUTINGS = {
    "mini": RING_MINI,
    "nano": Routing(
        num_experts=32, top_k=4, n_group=4, topk_group=2, normalize=True, routed_scaling_factor=2.5
    ),
    "flat": Routing(
        num_experts=64, top_k=6, n_group=1, topk_group=1, normalize=False, routed_scaling_factor=1.0
    ),
    "wide": Routing(
        num_experts=512,
        top_k=10,
        n_group=16,
        topk_group=16,
        normalize=True,
        routed_scaling_factor=1.5,
    ),
    "single": Routing(
        num_experts=8, top_k=2, n_group=8, topk_group=3, normalize=True, routed_scaling_factor=1.0
    ),
    "alone": Routing(
        num_experts=32, top_k=4, n_group=1, topk_group=1, normalize=True, routed_scaling_factor=1.0
    ),
    "all": Routing(
        num_experts=32, top_k=32, n_group=1, topk_group=1, normalize=True, routed_scaling_factor=1.0
    ),
    "large": Routing(
        num_experts=1024,
        top_k=8,
        n_group=32,
        topk_group=5,
        normalize=True,
        routed_scaling_factor=2.5,
    ),
}


def _route(
    hidden: Tensor, weight: Tensor, bias: Tensor, routing: Routing, **more: object
) -> tuple[Tensor, Tensor]:
    ids = Guarded((len(hidden), routing.top_k), torch.int32)
    weights = Guarded((len(hidden), routing.top_k), torch.float32)
    fields = {
        "hidden": hidden,
        "router_weight": weight,
        "expert_bias": bias,
        "expert_ids": ids.tensor,
        "routing_weights": weights.tensor,
        "tokens": len(hidden),
        "hidden_size": hidden.shape[1],
        "norm_eps": EPS,
        "hidden_dtype": DTYPES[hidden.dtype],
        **routing.attributes(),
        **more,
    }
    space = workspace("router", **fields)
    call = library().call("router", **fields, **space)
    for _ in range(3):  # the workspace must be as it was
        call.launch()
    return ids.check(), weights.check()


def _integers(routing: Routing, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a hidden state, router weights and a bias that make every logit exact, ties common."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randint(-1, 2, (tokens, 256), generator=generator).float()
    weight = torch.randint(-2, 3, (routing.num_experts, 256), generator=generator) / 32
    bias = torch.randint(0, 3, (routing.num_experts,), generator=generator) / 4
    return hidden, weight, bias


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 30, 63, 500])
def test_router_ties_and_choice(name: str, tokens: int) -> None:
    """The ids are the contract's, bit by bit."""
    routing, (hidden, weight, bias) = ROUTINGS[name], _integers(ROUTINGS[name], tokens)
    ids, weights = router(hidden.numpy(), weight.T.numpy(), bias.numpy(), routing)
    got_ids, got_weights = _route(hidden.cuda().bfloat16(), weight.cuda(), bias.cuda(), routing)
    np.testing.assert_array_equal(got_ids.cpu().numpy(), ids)
    np.testing.assert_allclose(got_weights.cpu().numpy(), weights, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "hidden_size"),
    [(1, 2048), (2, 4096), (7, 2048), (64, 2048), (130, 520), (4097, 2048)],
)
@pytest.mark.parametrize("norm", [False, True])
def test_router_random(dtype: torch.dtype, tokens: int, hidden_size: int, norm: bool) -> None:
    """Weights to 1e-5; ids equal wherever fp64 logits leave no doubt."""
    if norm and dtype != torch.float32:
        pytest.skip("the norm is of the fp32 residual")
    generator = torch.Generator("cuda").manual_seed(tokens)
    hidden = torch.randn(tokens, hidden_size, device="cuda", generator=generator).to(dtype)
    weight = torch.randn(256, hidden_size, device="cuda", generator=generator) * hidden_size**-0.5
    bias = torch.randn(256, device="cuda", generator=generator) * 0.1
    norm_weight = torch.rand(hidden_size, device="cuda", generator=generator) + 0.5
    got_ids, got_weights = _route(
        hidden, weight, bias, RING_MINI, **({"norm_weight": norm_weight} if norm else {})
    )
    wide = hidden.double()
    if norm:
        wide = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * norm_weight.double()
    ids, weights = router_fp64(wide @ weight.double().T, bias, RING_MINI)
    same = (got_ids.cpu().numpy() == ids).all(-1)
    assert same.mean() > 0.999, f"{(~same).sum()} of {tokens} tokens differ"
    np.testing.assert_allclose(got_weights.cpu().numpy()[same], weights[same], rtol=1e-5)


def router_fp64(logits: Tensor, bias: Tensor, routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    """The contract on given logits: an identity as router weight."""
    exact = logits.cpu().numpy()
    identity = np.eye(exact.shape[1], dtype=np.float32)
    return router(exact.astype(np.float32), identity, bias.cpu().numpy(), routing)


NAN, INF = float("nan"), float("inf")
# name: (what is filled, its rows, with what, whether the contract still says what is chosen)
CHANGES: dict[str, tuple[str, slice, list[float], bool]] = {
    "nan expert": ("weight", slice(5, 6), [NAN], True),
    "nan bias": ("bias", slice(3, 4), [-NAN], True),
    "infinite bias": ("bias", slice(6, 7), [INF], True),
    "half forbidden": ("bias", slice(0, None, 2), [-INF], True),
    "infinite expert": ("weight", slice(4, 5), [INF], False),
    "nan experts": ("weight", slice(0, 32), [-NAN], False),
    "nan everywhere": ("weight", slice(None), [NAN], False),
    "all forbidden": ("bias", slice(None), [-INF], False),
    "all wanted": ("bias", slice(None), [INF], False),
    "strange bias": ("bias", slice(None), [NAN, -NAN, INF, -INF, 3e38, -3e38, -0.0, 0.5], False),
}


def _assert_distinct(ids: Tensor, routing: Routing) -> None:
    """Each token has top_k different experts that exist."""
    inside = (ids >= 0) & (ids < routing.num_experts)
    assert bool(inside.all()), ids[~inside.all(-1)][:3]
    ordered = ids.sort(-1).values
    repeated = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    assert not bool(repeated.any()), ids[repeated][:3]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 8, 41])
def test_router_strange_weights(change: str, name: str, tokens: int) -> None:
    """Whatever the logits and the bias are, a token gets top_k different experts."""
    routing, (hidden, weight, bias) = ROUTINGS[name], _integers(ROUTINGS[name], tokens)
    field, rows, values, determined = CHANGES[change]
    changed = (weight if field == "weight" else bias)[rows]
    generator = torch.Generator().manual_seed(1)
    changed.copy_(
        torch.tensor(values)[torch.randint(len(values), changed.shape, generator=generator)]
    )
    got_ids, got_weights = _route(hidden.cuda().bfloat16(), weight.cuda(), bias.cuda(), routing)
    _assert_distinct(got_ids, routing)
    if determined:
        with np.errstate(all="ignore"):
            ids, weights = router(hidden.numpy(), weight.T.numpy(), bias.numpy(), routing)
        np.testing.assert_array_equal(got_ids.cpu().numpy(), ids)
        np.testing.assert_allclose(got_weights.cpu().numpy(), weights, rtol=1e-5)


@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", ["mini", "nano", "alone", "large"])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 70])
def test_router_strange_tokens(value: float, norm: bool, name: str, tokens: int) -> None:
    """A hidden state that is no number costs its own token the weights, other tokens nothing."""
    routing, hidden_size = ROUTINGS[name], 264
    generator = torch.Generator("cuda").manual_seed(tokens)
    hidden = torch.randn(tokens, hidden_size, device="cuda", generator=generator)
    weight = torch.randn(routing.num_experts, hidden_size, device="cuda", generator=generator)
    bias = torch.randn(routing.num_experts, device="cuda", generator=generator) * 0.1
    more = {"norm_weight": torch.ones(hidden_size, device="cuda")} if norm else {}
    hidden = hidden if norm else hidden.bfloat16()
    ids, weights = _route(hidden, weight, bias, routing, **more)
    strange = hidden.clone()
    strange[::3, 17] = value
    got_ids, got_weights = _route(strange, weight, bias, routing, **more)
    _assert_distinct(got_ids, routing)
    others = torch.arange(tokens, device="cuda") % 3 > 0
    assert torch.equal(got_ids[others], ids[others])
    assert torch.equal(got_weights[others].view(torch.int32), weights[others].view(torch.int32))
    if math.isnan(value):
        assert bool(got_weights[~others].isnan().all())
