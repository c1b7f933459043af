"""What a Hugging Face folder says of its model, and every mistake in it, is told before anything is loaded."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nova_sys.config import ModelConfig
from nova_sys.config_io import config_from, load_recipe, to_toml
from nova_sys.config_rules import broken_rules
from nova_sys.hf.config_json import read_model
from nova_sys.hf.config_out import family_for, write_config
from nova_sys.hf.families import dims_of, shape_of
from nova_sys.hf.folder import HFFolder, identity_of

transformers = pytest.importorskip("transformers")
spec = importlib.util.spec_from_file_location("hf_models", Path(__file__).with_name("hf_models.py"))
assert spec is not None and spec.loader is not None
hf_models: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf_models)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("hf")
    return {name: hf_models.make(name, root / name) for name in hf_models.OPTIONS}


@pytest.fixture
def folder(references: dict[str, Any], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(references["qwen2"].folder, tmp_path / "qwen2"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def change(folder: Path, **values: Any) -> None:
    """Sets keys of config.json; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | values
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


# -- config.json --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-linear", "llama3", "qwen3"])
def test_config_of_transformers_4_and_5(
    references: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """The older form is read as the newer one, and an export without a config.json to start from is read by transformers 5."""
    source = references[name].folder
    new = json.loads((source / "config.json").read_text())
    rope = new.pop("rope_parameters")
    old = {**new, "rope_theta": rope.pop("rope_theta"), "torch_dtype": new.pop("dtype")}
    old["rope_scaling"] = {**rope, "type": rope.pop("rope_type")} if len(rope) > 1 else None
    (tmp_path / "config.json").write_text(json.dumps(old))
    family, model = read_model(tmp_path)
    assert (family, model) == read_model(source)
    written = write_config(model, model.vocab_size, family, "float32", like={})
    assert written["torch_dtype"] == "float32" and "rope_parameters" not in written
    (tmp_path / "config.json").write_text(json.dumps(written))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    theirs, expected = config.rope_parameters, references[name].model.config.rope_parameters
    assert {key: theirs[key] for key in expected} == expected
    assert config.dtype == torch.float32
    assert read_model(tmp_path) == (family, model)


def test_a_folder_fills_the_recipe(references: dict[str, Any], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    source = references["qwen3"].folder
    recipe.write_text(f'[model]\ninit_from = "{source}"\nhead_dim = 16\n[data]\ntrain = "x"\n')
    model = load_recipe(recipe).model
    assert (model.num_layers, model.hidden_size, model.head_dim, model.qk_norm) == (4, 32, 16, True)
    assert model.vocab_size == 300 and model.norm_eps == 1e-5
    shifted = load_recipe(recipe, ["model.kv_shift=true"]).model
    assert shifted.kv_shift  # may be added to a model without it
    overrides = ["model.num_layers=2", "model.qk_norm=false", "model.vocab_size=400"]
    with pytest.raises(ValueError) as error:
        load_recipe(recipe, overrides)
    for part in ("3 problems", "model.num_layers = 2", "has 4", "model.qk_norm = false", "has 300"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("llama", {"architectures": ["GPT2LMHeadModel"]}, r'architectures = \["GPT2LMHeadModel"\]: must be one of LlamaFor'),
        ("llama", {"attention_bias": True, "hidden_act": "gelu"}, r"hidden_act = \"gelu\": must be \"silu\"(.|\n)*attention_bias = true"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 'rope_scaling of type "yarn": must be linear or llama3'),
        ("llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor = null: must be a number"),
        ("llama", {"num_hidden_layers": "4"}, 'num_hidden_layers = "4": must be a whole number'),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3: must divide"),
        ("llama", {"num_key_value_heads": "2", "head_dim": -8}, r'num_key_value_heads = "2": must be a whole(.|\n)*head_dim = -8'),
        ("llama", {"rms_norm_eps": "1e-5"}, 'rms_norm_eps = "1e-5": must be a number above 0'),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 10**400}}, "rope_theta = 10+: must be a number above 0"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta = -1.0: must be a number above 0"),
        ("mistral", {"sliding_window": [9]}, r"sliding_window = \[9\]: must be a whole number"),
        ("qwen3-windows", {"layer_types": 1}, "layer_types = 1: must tell which of the 4 layers have the window"),
        ("qwen3-windows", {"layer_types": ["full_attention", "linear_attention"] * 2}, "layer_types = .*must tell which of the 4 layers"),
        ("qwen3-windows", {"layer_types": [["full_attention"]] * 4}, "layer_types = .*must tell which of the 4 layers"),
        ("baichuan-m1", {"sliding_window_layers": [1.0, True]}, r"sliding_window_layers = \[1.0, true\]: must tell which"),
        ("mistral", {"num_hidden_layers": 2**40}, "num_hidden_layers = 1099511627776: must be at most"),
        ("baichuan-m1-windows", {"num_hidden_layers": 2**40}, "num_hidden_layers = 1099511627776: must be at most"),
        ("qwen2-windows", {"layer_types": None, "max_window_layers": "all"}, "layer_types = null: must tell which"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("baichuan", {"max_position_embeddings": None}, "ALiBi"),
        ("baichuan", {"num_key_value_heads": 2}, "has as many as num_attention_heads = 4"),
        ("baichuan", {"tie_word_embeddings": True}, "output layer of a BaichuanForCausalLM is its own"),
        ("baichuan-m1", {"sliding_window_layers": [1, 4]}, r"sliding_window_layers = \[1, 4\]: must tell which of the 4 layers"),
        ("baichuan-m1-windows", {"num_swa_attention_heads": "8"}, 'num_swa_attention_heads = "8": must be a whole number'),
        ("baichuan-m1-windows", {"head_dim": 16}, "head_dim = 16: must be left out where some layers have other heads"),
        ("baichuan-m1", {"conv_window": 3}, "conv_window = 3: must be 2"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_computed_is_refused(
    references: dict[str, Any], tmp_path: Path, name: str, values: dict[str, Any], message: str
) -> None:
    shutil.copy(references[name].folder / "config.json", tmp_path)
    change(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        read_model(tmp_path)


def test_windows_are_those_of_transformers(references: dict[str, Any], tmp_path: Path) -> None:
    """By layer, also where config.json leaves them to its defaults."""

    def windows(name: str, **values: Any) -> list[int]:
        shutil.copy(references[name].folder / "config.json", tmp_path)
        change(tmp_path, **values)
        model = read_model(tmp_path)[1]
        return [model.heads_of(layer).window for layer in range(model.num_layers)]

    for name in ("qwen2", "qwen2-windows", "qwen3", "qwen3-windows"):
        config = references[name].model.config
        slides = [kind == "sliding_attention" for kind in config.layer_types]
        assert windows(name) == [slide and config.sliding_window for slide in slides]
    assert windows("qwen2-windows", layer_types=None) == [0, 37, 37, 37]  # transformers 4
    assert windows("qwen2-windows", use_sliding_window=False, layer_types=None) == [0] * 4
    assert windows("mistral") == [37] * 4
    assert windows("mistral", sliding_window=None) == [4096] * 4  # transformers' default
    config = json.loads((tmp_path / "config.json").read_text()) | {"sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model(tmp_path)[1].sliding_window == 0
    assert windows("baichuan-m1") == [0] * 4
    assert windows("baichuan-m1-windows") == [0, 37, 0, 37]
    assert windows("llama", sliding_window=9) == [0] * 4  # transformers ignores it there


def test_a_recipe_may_say_what_the_folder_says(references: dict[str, Any], tmp_path: Path) -> None:
    """Lists of it, too: the config.toml that a run leaves starts the same run again."""
    folder = references["baichuan-m1-windows"].folder
    config = config_from([f"model.init_from={folder}", "data.train=x"], folder)
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert load_recipe(tmp_path / "config.toml") == config
    with pytest.raises(ValueError, match=r"window_layers = \[1\]: the model in .* has \[1, 3\]"):
        config_from(
            [f"model.init_from={folder}", "data.train=x", "model.window_layers=[1]"], folder
        )


def test_exports_that_no_family_can_say_name_the_windows() -> None:
    model = ModelConfig(num_layers=2, sliding_window=9, window_layers=(1,))
    with pytest.raises(
        ValueError, match=r"model.window_layers = \[1\].*MistralForCausalLM: sliding_window;"
    ):
        family_for(model, {})
    everywhere = ModelConfig(num_layers=2, sliding_window=9, window_layers=(0, 1))
    assert family_for(everywhere, {}).model_type == "mistral"
    qwen3 = ModelConfig(qk_norm=True)
    written = write_config(qwen3, 300, family_for(qwen3, {}), "float32", like={})
    assert transformers.AutoConfig.for_model(**written).head_dim == 256 // 8


def test_baichuan_m1_14b(references: dict[str, Any], tmp_path: Path) -> None:
    """The published shape: 20 heads of 256 over 2, and in every second layer 40 of 128 over 8 with a window."""
    shutil.copy(references["baichuan-m1-windows"].folder / "config.json", tmp_path)
    change(
        tmp_path,
        num_hidden_layers=40,
        hidden_size=5120,
        num_attention_heads=20,
        num_key_value_heads=2,
        sliding_window=8192,
    )
    change(
        tmp_path,
        sliding_window_layers=list(range(1, 40, 2)),
        num_swa_attention_heads=40,
        num_swa_key_value_heads=8,
    )
    model = read_model(tmp_path)[1]
    assert model.kinds_of_layers() == {(20, 2, 256, 0): 20, (40, 8, 128, 8192): 20}
    expected = dims_of(model, model.vocab_size, 0), dims_of(model, model.vocab_size, 1)
    assert [shape_of("NH+2KH D", dims) for dims in expected] == [(6144, 5120), (7168, 5120)]


def test_rules_of_the_rope_scaling() -> None:
    settings = ["data.train=x", "model.vocab_size=300"]

    def rules(*more: str) -> str:
        return "\n".join(broken_rules(config_from([*settings, *more], "-"), 1))

    assert "model.rope_factor = 2.0: has no effect" in rules("model.rope_factor=2")
    assert rules("model.rope_factor=2.0", "model.rope_scaling=linear") == ""
    assert "rope_original_positions = 0" in rules("model.rope_scaling=llama3")
    low = ("model.rope_low_freq_factor=5.0", "model.rope_original_positions=64")
    assert "must be below" in rules("model.rope_scaling=llama3", *low)


def test_a_model_without_an_architecture_is_told() -> None:
    with pytest.raises(ValueError, match="no Hugging Face architecture here computes a model with"):
        family_for(ModelConfig(kv_shift=True), {})
    assert family_for(ModelConfig(), {}).architecture == "LlamaForCausalLM"
    assert (
        family_for(ModelConfig(), {"architectures": ["MistralForCausalLM"]}).model_type == "mistral"
    )
    assert family_for(ModelConfig(norm_head=True, num_kv_heads=8), {}).model_type == "baichuan"


# -- tensors ------------------------------------------------------------------------------------------------------------------


def test_wrong_tensors_are_listed_together(folder: Path) -> None:
    tensors = weights_of(folder)
    del tensors["model.layers.2.self_attn.q_proj.bias"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(48, 31)
    tensors["model.layers.9.extra"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(32, dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        HFFolder(folder)
    for part in (
        "1 missing: model.layers.2.self_attn.q_proj.bias",
        "1 surplus, which the architecture does not have: model.layers.9.extra",
        "model.layers.0.mlp.up_proj.weight: [48, 31], not [48, 32]",
        "model.norm.weight: I8",
    ):
        assert part in str(error.value)


def test_what_tied_and_old_folders_hold_besides_is_left_out(folder: Path) -> None:
    tensors = weights_of(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors")
    HFFolder(folder)


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def point_outside(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_file(folder: Path) -> None:
    index = {"weight_map": dict.fromkeys(weights_of(folder), "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut_off, "model.safetensors cannot be read as safetensors"),
        (remove, "has config.json, but no safetensors"),
        (point_outside, "no file of the folder"),
        (lose_a_file, "model-00001-of-00002.safetensors is missing"),
    ],
)
def test_a_damaged_folder_is_told(
    folder: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        HFFolder(folder)


def test_more_layers_than_tensors_are_told_at_once(folder: Path) -> None:
    """The names of all that is missing would fill the memory."""
    change(folder, num_hidden_layers=2**16)
    with pytest.raises(ValueError, match=r"num_hidden_layers = 65536: every layer has"):
        HFFolder(folder)


def test_one_changed_number_is_another_model(folder: Path) -> None:
    """Reference log-probs are kept by this identity."""
    before = identity_of(folder, HFFolder(folder).files)
    assert identity_of(folder, HFFolder(folder).files) == before
    tensors = weights_of(folder)
    tensors["model.embed_tokens.weight"][299, 31] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    assert identity_of(folder, HFFolder(folder).files) != before


def test_a_run_from_before_these_options_may_go_on() -> None:
    """Its fields have none of them: that means their defaults, and no other value."""
    from nova_sys.start import NEWER_MODEL_FIELDS, _refuse_another_run, run_fields

    ours = run_fields(config_from(["data.train=x"], "-"))
    older = {k: v for k, v in ours.items() if k.removeprefix("model.") not in NEWER_MODEL_FIELDS}
    assert len(ours) - len(older) == 11
    _refuse_another_run(Path("runs/x"), older, ours)
    with pytest.raises(ValueError, match=r"model\.qk_norm: False there, True here"):
        _refuse_another_run(Path("runs/x"), older, ours | {"model.qk_norm": True})
