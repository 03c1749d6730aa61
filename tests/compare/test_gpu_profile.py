"""How the kernels of a profiled step are summed: times by kind of layer, launches by name."""

import pytest

from ringexport.compare.gpu.profile import _STEPS, _short, _summary

MARK = ("void at::native::bitwise_not_kernel<short>(int)", 1.0)


def test_kernels_are_summed_by_kind_and_by_name() -> None:
    step = [
        ("gather", 2.0),
        MARK,
        ("void product<8>(P)", 10.0),
        ("void state(P)", 4.0),
        MARK,
        ("void product<8>(P)", 6.0),
        MARK,
        ("void product<16>(P)", 20.0),
        ("greedy", 3.0),
    ]
    found = _summary(step * _STEPS, ["linear", "experts", "head"])
    assert found.kinds == pytest.approx(
        {"embedding": 2.0, "linear": 14.0, "experts": 6.0, "head": 23.0}
    )
    assert [(one.name, one.launches, one.us) for one in found.kernels] == [
        ("product<16>", 1, pytest.approx(20.0)),
        ("product<8>", 2, pytest.approx(16.0)),
        ("state", 1, pytest.approx(4.0)),
        ("greedy", 1, pytest.approx(3.0)),
        ("gather", 1, pytest.approx(2.0)),
    ]
    assert found.launches == 6
    assert sum(found.kinds.values()) == pytest.approx(sum(one.us for one in found.kernels))


def test_names_lose_their_arguments() -> None:
    name = "void ringkernels::moe::(anonymous namespace)::add<Fp8, 1>(Params, Plan)"
    assert _short(name) == "moe::add<Fp8, 1>"
    assert _short("void f<(Op)1, 2>(Args)") == "f<(Op)1, 2>"
    assert _short("nvjet_sm90_tst_64x32") == "nvjet_sm90_tst_64x32"
