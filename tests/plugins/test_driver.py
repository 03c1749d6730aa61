"""The plugins through TensorRT's own interface: without a GPU, everything but enqueue."""

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ringexport.engine.plugins import ABI_VERSION, DEFAULT_LIBRARY, NO_KERNELS, PluginLibrary
from ringexport.kernels.library import KernelLibrary
from tests.plugins.cases import CASES, DTYPES, PluginCase

SEED = 20261121
ULPS = {"bf16": 2.0**-8, "fp16": 2.0**-11}
MAX_ULPS = 4
"""Of the largest value: sums in another order, products rounded to the dtype before they are summed
over the experts, and one more rounding in the output."""
STATE_RTOL = 1e-5


def drive(driver: Path, case: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([driver, case], capture_output=True, text=True, check=False)


def make(name: str, dtype: str = "bf16") -> PluginCase:
    return CASES[name](np.random.default_rng(SEED), DTYPES[dtype])


@pytest.mark.parametrize("name", CASES)
def test_plugin_keeps_its_promises(
    plugin_driver: Path, host_plugins: Path, tmp_path: Path, name: str
) -> None:
    case = make(name)
    done = drive(plugin_driver, case.write(tmp_path, host_plugins))
    assert done.returncode == 0, done.stdout
    aliases = dict(
        line.removeprefix("alias: ").split()
        for line in done.stdout.splitlines()
        if line.startswith("alias: ")
    )
    wanted = {"present_state": "3", "present_key": "3", "present_value": "4"}
    assert all(index == wanted.get(output, "-1") for output, index in aliases.items())


def changed(case: PluginCase, **fields: object) -> PluginCase:
    return replace(case, **fields)


def test_wrong_fields_are_refused_in_one_sentence(
    plugin_driver: Path, host_plugins: Path, tmp_path: Path
) -> None:
    case = make("experts-1")
    attributes = case.attributes
    for given, message in (
        ({"num_experts": 32}, "attribute top_k is missing"),
        (attributes | {"topk": 4}, "attribute 'topk' is not known"),
        (
            attributes | {"num_experts": 31},
            "gate_up_proj has shape [32 64 256], expected [E 2*I D]",
        ),
    ):
        done = drive(plugin_driver, changed(case, attributes=given).write(tmp_path, host_plugins))
        assert done.returncode == 3
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("log: ")]
        assert "RingExperts plugin of layer case, " in line
        assert message in line


def test_a_field_of_another_type_is_refused(
    plugin_driver: Path, host_plugins: Path, tmp_path: Path
) -> None:
    path = make("linear-decode").write(tmp_path, host_plugins)
    path.write_text(path.read_text().replace("num_heads int 4", "num_heads real 4"))
    done = drive(plugin_driver, path)
    assert done.returncode == 3
    assert "attribute num_heads is float32 x 1, expected one int32" in done.stdout


@pytest.mark.parametrize(
    ("attribute", "length", "kind"),
    [("num_heads", 2, "int32"), ("num_heads", 0, "int32"), ("query_scale", 3, "float32")],
)
def test_a_field_of_another_length_is_refused(
    plugin_driver: Path,
    host_plugins: Path,
    tmp_path: Path,
    attribute: str,
    length: int,
    kind: str,
) -> None:
    case = make("linear-decode").write(tmp_path, host_plugins, f"length {attribute} {length}")
    done = drive(plugin_driver, case)
    assert done.returncode == 3
    said = f"attribute {attribute} is {kind} x {length}, expected one {kind}"
    assert f"createPlugin: RingLinearAttention: {said}" in done.stdout


@pytest.mark.parametrize(
    ("name", "attribute", "value", "said"),
    [
        ("linear-decode", "num_heads", -1, "is -1, expected 1 or more"),
        ("linear-decode", "query_scale", -0.5, "is -0.500000, expected a positive number"),
        ("attention-decode", "num_kv_heads", 0, "is 0, expected 1 or more"),
        ("router-1", "top_k", 0, "is 0, expected 1 or more"),
        ("router-1", "n_group", 0, "is 0, expected 1 or more"),
        ("router-1", "normalize", 2, "is 2, expected 0 or 1"),
        ("router-1", "n_group", 5, "is 5, expected a divisor of num_experts, 32"),
        ("router-1", "topk_group", 5, "is 5, expected at most n_group, 4"),
        ("router-1", "top_k", 17, "is 17, expected at most the experts of topk_group groups, 16"),
        ("attention-decode", "num_heads", 5, "is 5, expected a multiple of num_kv_heads, 2"),
        ("experts-1", "num_experts", -1, "is -1, expected 1 or more"),
        ("experts-fp8-1", "fp8_bytes", 2, "is 2, expected 0 or 1"),
        ("projection-fp8-1", "fp8_bytes", -1, "is -1, expected 0 or 1"),
    ],
)
def test_values_out_of_range_are_refused(
    plugin_driver: Path,
    host_plugins: Path,
    tmp_path: Path,
    name: str,
    attribute: str,
    value: float,
    said: str,
) -> None:
    case = make(name)
    wrong = changed(case, attributes=case.attributes | {attribute: value})
    done = drive(plugin_driver, wrong.write(tmp_path, host_plugins))
    assert done.returncode == 3
    assert f"createPlugin: {wrong.op}: attribute {attribute} {said}" in done.stdout


def test_wrong_tensors_are_refused(plugin_driver: Path, host_plugins: Path, tmp_path: Path) -> None:
    case = make("linear-decode")
    wrong_type = [*case.inputs[:3], case.inputs[3].astype(np.float16), *case.inputs[4:]]
    wrong_shape = [case.inputs[0][:, :, :-64], *case.inputs[1:]]
    for inputs, message in (
        (wrong_type, "past_state is fp16, expected fp32"),
        (wrong_shape, "key has shape [3 1 256], expected [B T H*K] with B=3, T=1, H=4, K=48"),
    ):
        done = drive(plugin_driver, changed(case, inputs=inputs).write(tmp_path, host_plugins))
        assert done.returncode == 3, done.stdout
        assert message in done.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("experts-fp8-1", "gate_up_proj is fp8_e4m3, expected int8"),
        ("projection-fp8-1", "weight is fp8_e4m3, expected int8"),
    ],
)
def test_fp8_tensors_are_no_bytes_of_fp8(
    plugin_driver: Path, host_plugins: Path, tmp_path: Path, name: str, said: str
) -> None:
    case = make(name)
    wrong = changed(case, attributes=case.attributes | {"fp8_bytes": 1})
    done = drive(plugin_driver, wrong.write(tmp_path, host_plugins))
    assert done.returncode == 3
    assert f"{wrong.op}: attribute fp8_bytes is 1 and {said}" in done.stdout
    assert "refused: getOutputDataTypes" in done.stdout


def test_fields_of_another_abi_are_refused(
    plugin_driver: Path, host_plugins: Path, tmp_path: Path
) -> None:
    done = drive(plugin_driver, make("router-1").write(tmp_path, host_plugins, "abi 7"))
    assert done.returncode == 3
    said = f"built with version 7 of the plugins, this library has version {ABI_VERSION}"
    assert said in done.stdout


def test_a_library_without_kernels_says_so(host_plugins: Path) -> None:
    assert PluginLibrary.read(host_plugins).kernels == NO_KERNELS


def kernel_library() -> Path:
    path = Path(os.environ.get("RINGEXPORT_PLUGIN_LIBRARY", DEFAULT_LIBRARY))
    if not path.is_file() or PluginLibrary.read(path).kernels == NO_KERNELS:
        pytest.skip(f"no plugin library with kernels at {path}")
    return path.resolve()


def gpu_driver(fallback: pytest.FixtureRequest) -> Path:
    given = os.environ.get("RINGEXPORT_PLUGIN_DRIVER")
    return Path(given) if given else fallback.getfixturevalue("plugin_driver")


def workspace_bytes(driver: Path, case: Path) -> int:
    done = drive(driver, case)
    assert done.returncode == 0, done.stdout
    lines = dict(line.partition(": ")[::2] for line in done.stdout.splitlines())
    return int(lines["workspace_bytes"])


@pytest.mark.parametrize("name", CASES)
def test_memory_for_a_profile_serves_every_shape_in_it(
    plugin_driver: Path, tmp_path: Path, name: str
) -> None:
    """Needs a library with kernels, but no GPU: few tokens may want more than many."""
    library, case = kernel_library(), make(name)
    alone = workspace_bytes(plugin_driver, case.write(tmp_path, library))
    for factor in (2, 40):
        lines = case.profile(factor)
        shared = workspace_bytes(plugin_driver, case.write(tmp_path, library, *lines))
        assert shared >= alone


def test_memory_of_a_router_has_its_peak_inside_a_profile(
    plugin_driver: Path, tmp_path: Path
) -> None:
    """Needs a library with kernels, but no GPU: 2112 tokens are split into more parts than 2200."""
    library, case = kernel_library(), make("router-500")
    arrays = (*case.inputs[:1], *case.outputs)
    hidden, *outputs = (np.zeros((2112, array.shape[1]), array.dtype) for array in arrays)
    case = changed(case, inputs=[hidden, *case.inputs[1:]], outputs=outputs)
    alone = workspace_bytes(plugin_driver, case.write(tmp_path, library))
    lines = [line.replace("2112", "2200") for line in case.profile(1)]
    assert workspace_bytes(plugin_driver, case.write(tmp_path, library, *lines)) >= alone


def test_memory_of_attention_serves_its_last_rows(plugin_driver: Path, tmp_path: Path) -> None:
    """Needs libraries with kernels but no GPU: 1200 tokens are 1024 rows, and 176 in more parts."""
    library, case = kernel_library(), make("attention-few-of-many-rows")
    kernels = library.with_name("libringkernels.so")
    if not kernels.is_file():
        pytest.skip(f"no kernel library at {kernels}")
    heads, dim = 4, 64
    index_bytes, row_bytes = 1024 * 4, 1024 * heads * dim * 2
    sizes = {"num_heads": heads, "num_kv_heads": 1, "head_dim": dim}
    needs = [
        KernelLibrary.open(kernels).workspace_bytes("attention_decode", batch=batch, **sizes)
        for batch in (1024, 176)
    ]
    assert needs[1] > needs[0]
    found = workspace_bytes(plugin_driver, case.write(tmp_path, library))
    assert found >= 2 * index_bytes + 2 * row_bytes + needs[1]


@pytest.mark.parametrize("tokens", [1, 70])
def test_bytes_of_fp8_codes_take_the_memory_of_fp8(
    plugin_driver: Path, tmp_path: Path, tokens: int
) -> None:
    """Needs a library with kernels, but no GPU: prepared tokens take two bytes in FP8."""
    library = kernel_library()
    fp8, as_bytes, int8 = (
        workspace_bytes(plugin_driver, make(f"experts-{name}-{tokens}").write(tmp_path, library))
        for name in ("fp8", "fp8-bytes", "int8")
    )
    assert as_bytes == fp8 > int8


@pytest.mark.gpu
@pytest.mark.parametrize("buffers", ["aliased", "separate", "profile"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_plugin_matches_the_contract(
    request: pytest.FixtureRequest, tmp_path: Path, name: str, dtype: str, buffers: str
) -> None:
    case = make(name, dtype)
    lines = ["enqueue"]
    if buffers == "separate":
        lines.append("separate")
    if (
        buffers == "profile"
    ):  # the scratch memory of larger shapes serves these, which may want more
        lines += case.profile(8)
    done = drive(gpu_driver(request), case.write(tmp_path, kernel_library(), *lines))
    assert done.returncode == 0, done.stdout + done.stderr
    for output, (found, expected) in case.results(tmp_path).items():
        used = case.used.get(output, np.ones(expected.shape, bool))
        mine, theirs = (array[used].astype(np.float64) for array in (found, expected))
        if output in case.exact:
            np.testing.assert_array_equal(mine, theirs, err_msg=output)
            continue
        largest = np.abs(theirs).max()
        is_fp32 = expected.dtype == np.float32
        relative = STATE_RTOL * 8 if is_fp32 else MAX_ULPS * ULPS[dtype]
        # Products of many tokens wait in 16 bits, where a few round to another code: level L2.
        bound = relative * largest + 2 * case.rounding.get(output, 0.0)
        worst = np.abs(mine - theirs).max()
        assert worst <= bound, f"{output}: {worst:g} of {largest:g}, bound {bound:g}"
