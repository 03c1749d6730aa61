"""Recipes: those that are shipped, the user's own, and everything that is wrong with one."""

import tomllib
from pathlib import Path
from typing import Any

import pytest

from ringexport.checkpoint import RingConfig, TensorKind
from ringexport.errors import ConfigError, QuantizationError
from ringexport.ops.quantization import Granularity, NumberFormat
from ringexport.ops.schemes import (
    ActivationMode,
    ActivationScheme,
    ModuleScheme,
    WeightObserver,
    WeightScheme,
)
from ringexport.quantize.modules import protected_modules, quantizable_modules
from ringexport.quantize.recipe import ComputeDtype, Fold, Recipe, SmoothQuant, StateFormat
from ringexport.quantize.resolve import ResolvedRecipe, resolve_recipe
from ringexport.quantize.scheme import PRESETS
from ringexport.quantize.shipped import load_recipe, shipped_recipes
from tests.checkpoints import tiny_config

ROOT = Path(__file__).parents[2]
SHIPPED = ("bf16", "fp32", "fp8", "fp8-all", "fp8-block", "fp8-static", "int8", "int8-weight-only")
CONFIG = RingConfig.from_dict(tiny_config(), source="tiny")
DESIGNED = {"routed_experts", "shared_experts", "dense_mlp", "linear_attention"}


def parse(text: str) -> Recipe:
    return Recipe.from_dict(tomllib.loads(text), name="mine", source="mine.toml")


def kinds(resolved: ResolvedRecipe) -> set[str]:
    return {entry.module.kind.value for entry in resolved.quantized.values()}


def test_shipped_recipes_are_those_of_the_design() -> None:
    assert shipped_recipes() == SHIPPED
    files = {path.stem for path in (ROOT / "calibration" / "recipes").glob("*.toml")}
    assert files == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_module_gets_one_scheme_and_the_router_none(name: str) -> None:
    recipe = load_recipe(name)
    resolved = resolve_recipe(recipe, CONFIG)
    assert recipe.description
    assert recipe.name == name
    names = [entry.module.name for entry in resolved.modules]
    assert names == [module.name for module in quantizable_modules(CONFIG)]
    assert not set(names) & set(protected_modules(CONFIG))
    assert not any(name.endswith(("mlp.gate", "norm", "word_embeddings")) for name in names)
    assert sum(row.modules for row in resolved.rows()) == len(names)
    assert recipe.recurrent_state is StateFormat.FP32


def test_coverage_and_formats_of_shipped_recipes() -> None:
    found = {name: resolve_recipe(load_recipe(name), CONFIG) for name in SHIPPED}
    everything = DESIGNED | {"softmax_attention", "lm_head"}
    assert {name: kinds(resolved) for name, resolved in found.items()} == {
        "bf16": set(),
        "fp32": set(),
        "fp8": DESIGNED,
        "fp8-all": everything,
        "fp8-block": DESIGNED,
        "fp8-static": DESIGNED,
        "int8": DESIGNED,
        "int8-weight-only": everything,
    }
    schemes = {
        name: {entry.scheme for entry in resolved.quantized.values()}
        for name, resolved in found.items()
    }
    assert schemes["fp8"] == schemes["fp8-all"] == {PRESETS["fp8_e4m3_dynamic"]}
    assert schemes["fp8-static"] == {PRESETS["fp8_e4m3_static"]}
    assert schemes["fp8-block"] == {PRESETS["fp8_e4m3_block"]}
    assert schemes["int8"] == {PRESETS["int8_w8a8"]}
    assert schemes["int8-weight-only"] == {PRESETS["int8_w8a16"]}
    assert found["fp32"].recipe.compute_dtype is ComputeDtype.FP32
    assert found["fp8-all"].recipe.kv_cache is not None
    assert found["int8"].recipe.smoothquant == SmoothQuant(strength=None)
    needing = {name for name, resolved in found.items() if resolved.stats_reasons}
    assert needing == {"fp8-all", "fp8-static", "int8"}


def test_own_recipe_with_patterns_and_exceptions() -> None:
    recipe = parse(
        """
        description = "mine"
        recurrent_state = "fp16"
        [[rules]]
        targets = ["routed_experts", "linear_attention"]
        except = ["model.layers.1.*", 're:model\\.layers\\.\\d+\\.attention\\.g_proj']
        weights = { format = "int8", granularity = "group(16)", observer = "mse" }
        [[rules]]
        targets = ["*.down_proj"]
        weights = { format = "fp8_e4m3", granularity = "block(8, 8)" }
        activations = { format = "fp8_e4m3", granularity = "group(8)", mode = "dynamic" }
        [[rules]]
        targets = ["model.layers.3.mlp.experts.2.down_proj"]
        scheme = "unquantized"
        """
    )
    resolved = resolve_recipe(recipe, CONFIG)
    schemes = {entry.module.name: entry.scheme for entry in resolved.modules}
    int8 = ModuleScheme(
        weights=WeightScheme(
            format=NumberFormat.INT8,
            granularity=Granularity.parse("group(16)"),
            observer=WeightObserver.MSE,
        )
    )
    fp8 = ModuleScheme(
        weights=WeightScheme(
            format=NumberFormat.FP8_E4M3, granularity=Granularity.parse("block(8, 8)")
        ),
        activations=ActivationScheme(
            format=NumberFormat.FP8_E4M3,
            granularity=Granularity.parse("group(8)"),
            mode=ActivationMode.DYNAMIC,
        ),
    )
    assert schemes["model.layers.0.attention.query_key_value"] == int8
    assert schemes["model.layers.1.attention.query_key_value"] == ModuleScheme()
    assert schemes["model.layers.0.attention.g_proj"] == ModuleScheme()
    assert schemes["model.layers.2.mlp.experts.7.up_proj"] == int8
    assert schemes["model.layers.2.mlp.experts.7.down_proj"] == fp8
    assert schemes["model.layers.3.mlp.experts.2.down_proj"] == ModuleScheme()
    assert recipe.recurrent_state is StateFormat.FP16


def test_own_recipe_based_on_another(tmp_path: Path) -> None:
    (tmp_path / "lower.toml").write_text(
        'base = "fp8-all"\nkv_cache = "none"\n'
        '[[rules]]\ntargets = ["lm_head"]\nscheme = "unquantized"\n'
    )
    (tmp_path / "upper.toml").write_text(
        'base = "lower.toml"\n[smoothquant]\nfolds = ["up_proj"]\n'
    )
    recipe = load_recipe(str(tmp_path / "upper.toml"))
    assert recipe.name == "upper"
    assert recipe.kv_cache is None
    assert recipe.smoothquant == SmoothQuant(strength=0.5, folds=(Fold.UP_PROJ,))
    assert recipe.description == load_recipe("fp8-all").description
    assert kinds(resolve_recipe(recipe, CONFIG)) == DESIGNED | {"softmax_attention"}


RULE = '[[rules]]\ntargets = ["lm_head"]\n'
WRONG = {
    "descripton = 'x'": ("unknown key 'descripton'", "did you mean 'description'?"),
    "[[rules]]\ntarget = ['lm_head']": ("rules[0] holds the unknown key 'target'", "'targets'"),
    "[[rules]]\nscheme = 'int8_w8a8'": ("rules[0]: targets", None),
    RULE: ("needs either a scheme or weights", "fp8_e4m3_block"),
    RULE + "scheme = 'int8'": ("scheme is 'int8'", None),
    RULE + "scheme = 'int8_w8a8'\nweights = {}": ("needs either a scheme or weights", None),
    RULE + "scheme = 'int8_w8a8'\nactivations = {}": ("both scheme and activations", None),
    RULE + "weights = { format = 'int8' }": ("weights lacks granularity", None),
    RULE + "weights = { format = 'int4', granularity = 'channel' }": (
        "format is 'int4', expected 'fp8_e4m3' or 'int8'",
        None,
    ),
    RULE + "weights = { format = 'int8', granularity = 'token' }": ("per token", "'channel'"),
    RULE + "weights = { format = 'int8', granularity = 'row' }": ("granularity 'row'", None),
    RULE
    + "weights = { format = 'int8', granularity = 'channel' }\n"
    + "activations = { format = 'fp8_e4m3', granularity = 'token', mode = 'dynamic' }": (
        "cannot be multiplied",
        None,
    ),
    RULE
    + "weights = { format = 'int8', granularity = 'channel' }\n"
    + "activations = { format = 'int8', granularity = 'token', mode = 'static' }": (
        "static activations cannot be quantized per token, expected tensor",
        None,
    ),
    "[[rules]]\ntargets = ['routed_expert']\nscheme = 'int8_w8a8'": (
        "'routed_expert' is no kind of module",
        "did you mean 'routed_experts'?",
    ),
    "[[rules]]\ntargets = ['router']\nscheme = 'int8_w8a8'": ("can never be quantized", "lm_head"),
    "[[rules]]\ntargets = ['norm']\nscheme = 'int8_w8a8'": ("can never be quantized", None),
    "[[rules]]\ntargets = ['re:(']\nscheme = 'int8_w8a8'": ("no regular expression", None),
    "[[rules]]\ntargets = 'lm_head'\nscheme = 'int8_w8a8'": ("a list of kinds", None),
    "rules = 3": ("a list of tables", None),
    "kv_cache = 'fp8'": ("kv_cache is 'fp8'", None),
    "recurrent_state = 'fp4'": ("recurrent_state is 'fp4'", None),
    "[smoothquant]\nstrength = 2.0": ("strength is 2.0", None),
    "[smoothquant]\nfolds = ['norm']": ("folds", None),
    "[smoothquant]\nalpha = 0.5": ("unknown key 'alpha'", None),
    "smoothquant = true": ("smoothquant is True, expected a table", None),
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_recipes_are_refused(text: str) -> None:
    message, hint = WRONG[text]
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert message in caught.value.message
    assert "mine.toml" in caught.value.message
    if hint:
        assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("target", "message", "hint"),
    [
        ("model.layers.1.mlp.gate", "which can never be quantized", "router, norms"),
        ("*norm", "which can never be quantized", "router, norms"),
        ("model.word_embeddings", "which can never be quantized", "router, norms"),
        ("model.layers.9.*", "matches none of the 275 modules", None),
        ("model.layers.1.attention.dens.", "matches none", "model.layers.1.attention.dense"),
    ],
)
def test_patterns_have_to_match_something_that_can_be_quantized(
    target: str, message: str, hint: str | None
) -> None:
    for key in ("targets", "except"):
        lists = {"targets": ["lm_head", "routed_experts", "*"], "except": []} | {key: [target]}
        rule: dict[str, Any] = {**lists, "scheme": "int8_w8a16"}
        recipe = Recipe.from_dict({"rules": [rule]}, name="mine", source="mine.toml")
        with pytest.raises(ConfigError, match=message) as caught:
            resolve_recipe(recipe, CONFIG)
        assert f"rules[0].{key}" in caught.value.message
        if hint:
            assert hint in (caught.value.hint or "")


def test_a_wide_pattern_leaves_the_router_alone() -> None:
    recipe = parse("[[rules]]\ntargets = ['model.layers.1.*']\nscheme = 'int8_w8a16'")
    names = set(resolve_recipe(recipe, CONFIG).quantized)
    assert "model.layers.1.mlp.experts.0.gate_proj" in names
    assert "model.layers.1.mlp.gate" not in names


def test_ragged_groups_are_refused() -> None:
    recipe = parse(RULE + "weights = { format = 'int8', granularity = 'group(48)' }")
    with pytest.raises(
        QuantizationError, match=r"lm_head has 64 columns, no multiple of its group"
    ):
        resolve_recipe(recipe, CONFIG)


def test_a_kind_that_the_model_lacks_selects_nothing() -> None:
    config = RingConfig.from_dict(tiny_config(first_k_dense_replace=0), source="tiny")
    resolved = resolve_recipe(load_recipe("fp8"), config)
    assert kinds(resolved) == DESIGNED - {TensorKind.DENSE_MLP}


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipe 'fp-8'") as caught:
        load_recipe("fp-8")
    assert (caught.value.hint or "").startswith("did you mean 'fp8'? choices: bf16, fp32,")
    with pytest.raises(ConfigError, match="cannot read"):
        load_recipe(str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    for data in (b"a = ", b"\xff", b"x = 1\n" * 200_000):
        broken.write_bytes(data)
        with pytest.raises(ConfigError, match=r"broken\.toml") as caught:
            load_recipe(str(broken))
        assert caught.value.hint is not None
    broken.write_text('base = "broken.toml"')
    with pytest.raises(ConfigError, match="more than 8 recipes below it"):
        load_recipe(str(broken))
    broken.write_text("base = 3")
    with pytest.raises(ConfigError, match="base is 3"):
        load_recipe(str(broken))


def test_readme_lists_schemes_kinds_and_keys() -> None:
    text = (ROOT / "calibration" / "recipes" / "README.md").read_text(encoding="utf-8")
    missing = [
        word
        for word in (*PRESETS, *SHIPPED, *DESIGNED, *Fold, *StateFormat, "except", "base")
        if f"`{word}`" not in text
    ]
    assert missing == []


def test_example_of_the_readme_works() -> None:
    text = (ROOT / "calibration" / "recipes" / "README.md").read_text(encoding="utf-8")
    example = tomllib.loads(text.split("```toml")[1].split("```")[0])
    recipe = Recipe.from_dict(example, name="own", source="own.toml", base=load_recipe("fp8"))
    schemes = {e.module.name: e.scheme for e in resolve_recipe(recipe, CONFIG).modules}
    assert schemes["model.layers.0.attention.dense"] == ModuleScheme()
    assert schemes["model.layers.0.mlp.up_proj"] == PRESETS["fp8_e4m3_dynamic"]
    assert str(schemes["lm_head"].weights) == "int8 group(64) mse"
