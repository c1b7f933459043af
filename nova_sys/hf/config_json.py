"""config.json of a Hugging Face folder to `[model]` of a recipe; config_out.py is the way back.

Read as transformers 4 writes it (rope_theta, rope_scaling, torch_dtype) and as 5 does (rope_parameters, dtype).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nova_sys.config import ModelConfig
from nova_sys.hf.families import FAMILIES, OPTIONS, Family

CONFIG = "config.json"
NAMES = {  # our field: theirs
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "ffn_hidden_size": "intermediate_size",
    "vocab_size": "vocab_size",
}
ROPE_NAMES = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_positions": "original_max_position_embeddings",
}
ROPE_TYPES = {  # ours: theirs, and what it reads
    "none": ("default", ()),
    "linear": ("linear", ("rope_factor",)),
    "llama3": ("llama3", tuple(ROPE_NAMES)),
}
SWA_HEADS = {  # of layers with a window: theirs, ours
    "num_swa_attention_heads": "window_heads",
    "num_swa_key_value_heads": "window_kv_heads",
}
ONLY = {  # a key that is there must have one of these values: nothing here computes the others
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1, 1.0),
    "attention_dropout": (0, 0.0),
    "conv_window": (2,),
    "quantization_config": (None,),
}
MAX_LAYERS = 100_000
A_NUMBER = "must be a number above 0"
FROM_FOLDER = (
    "num_kv_heads",
    "head_dim",
    "qkv_bias",
    "qk_norm",
    "norm_head",
    "kv_shift",
    "tied_embeddings",
    "sliding_window",
    "window_layers",
    "window_heads",
    "window_kv_heads",
    "norm_eps",
    "rope_base",
    "rope_scaling",
    *ROPE_NAMES,
    *NAMES,
)
"""The fields of [model] that a folder decides."""


def is_hf_folder(path: str | Path) -> bool:
    """A folder with config.json that is no checkpoint of ours."""
    try:
        return (Path(path) / CONFIG).is_file() and not (Path(path) / "nova.json").exists()
    except OSError:
        return False


def read_config(folder: Path) -> dict[str, Any]:
    """Raises: ValueError when config.json is no JSON object."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        if not isinstance(config, dict):
            raise ValueError("it is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / CONFIG} cannot be read ({error}); a Hugging Face folder needs it. Download or export the model again"
        ) from None
    return config


def read_model(folder: Path) -> tuple[Family, ModelConfig]:
    """The family and the model that config.json describes.

    Raises: ValueError that lists everything in it that no model here computes, and everything that is missing.
    """
    config = read_config(folder)
    problems: list[str] = []
    family = _family(config, problems)
    if family is None:
        raise ValueError(_told(folder, problems))
    config = family.defaults | config
    fields: dict[str, Any] = {
        ours: _number(config, theirs, problems) for ours, theirs in NAMES.items()
    }
    problems += [
        f"{key} = {json.dumps(config[key])[:80]}: must be {' or '.join(json.dumps(v) for v in dict.fromkeys(allowed))} or left out"
        for key, allowed in ONLY.items()
        if key in config and config[key] not in allowed and config[key] is not None
    ]
    if fields["num_layers"] > MAX_LAYERS:
        problems.append(f"num_hidden_layers = {fields['num_layers']}: must be at most {MAX_LAYERS}")
        fields["num_layers"] = 1
    fields |= _rope_fields(config, problems)
    fields |= {option: option in family.has for option in OPTIONS}
    kv_heads = _optional_number(config, "num_key_value_heads", problems)
    fields["num_kv_heads"] = kv_heads or fields["num_heads"]
    fields["head_dim"] = _optional_number(config, "head_dim", problems)
    fields["norm_eps"] = config.get("rms_norm_eps", 1e-6)
    if not _is_positive(fields["norm_eps"]):
        problems.append(f"rms_norm_eps = {json.dumps(fields['norm_eps'])}: {A_NUMBER}")
    fields["tied_embeddings"] = bool(config.get("tie_word_embeddings", False))
    fields |= _window_fields(family, config, fields, problems)
    if not problems:
        problems += _family_problems(family, fields, config)
    if problems:
        raise ValueError(_told(folder, problems))
    if fields["head_dim"] * fields["num_heads"] == fields["hidden_size"]:
        fields["head_dim"] = 0
    return family, ModelConfig(**fields)


def _told(folder: Path, problems: list[str]) -> str:
    listed = "".join(f"\n  {problem}" for problem in problems)
    return f"{folder / CONFIG} describes a model that this version cannot use:{listed}"


def _family(config: dict[str, Any], problems: list[str]) -> Family | None:
    named = config.get("architectures") or []
    for family in FAMILIES:
        if named == [family.architecture] or (
            not named and config.get("model_type") == family.model_type
        ):
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    problems.append(f"architectures = {json.dumps(named)}: must be one of {known}")
    return None


def _number(config: dict[str, Any], key: str, problems: list[str]) -> int:
    value = config.get(key)
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    problems.append(f"{key} = {json.dumps(value)}: must be a whole number above 0")
    return 1


def _optional_number(config: dict[str, Any], key: str, problems: list[str]) -> int:
    """0 where the key is not there."""
    return _number(config, key, problems) if config.get(key) else 0


def _is_positive(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= sys.float_info.max  # JSON's whole numbers have no end


def _rope_fields(config: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """rope_parameters (transformers 5), or rope_theta and rope_scaling (4)."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
        problems.append(
            f"rope_parameters = {json.dumps(given)[:200]}: must be one rule for all layers"
        )
        return {}
    kind = given.get("rope_type", given.get("type", "default"))
    base = given.get("rope_theta", config.get("rope_theta", 10000.0))
    ours = next((name for name, (theirs, _) in ROPE_TYPES.items() if theirs == kind), None)
    if ours is None:
        problems.append(
            f"rope_scaling of type {json.dumps(kind)}: must be linear or llama3, or none"
        )
        return {}
    if given.get("partial_rotary_factor", 1) != 1:
        problems.append(f"partial_rotary_factor = {given['partial_rotary_factor']}: must be 1")
    fields: dict[str, Any] = {"rope_scaling": ours, "rope_base": base}
    for name in ROPE_TYPES[ours][1]:
        value = given.get(ROPE_NAMES[name])
        if value is None and name == "rope_original_positions":
            value = config.get("max_position_embeddings")  # where transformers looks, too
        fields[name] = value
    for name, value in fields.items():
        if name != "rope_scaling" and not _is_positive(value):
            theirs = ROPE_NAMES.get(name, "rope_theta")
            problems.append(
                f"{theirs} = {json.dumps(value)}: {A_NUMBER}, for rope_scaling of type {kind}"
            )
        elif name != "rope_scaling":
            fields[name] = int(value) if name == "rope_original_positions" else float(value)
    return fields


def _window_fields(
    family: Family, config: dict[str, Any], fields: dict[str, Any], problems: list[str]
) -> dict[str, Any]:
    """Which layers have a window, as the family's configuration tells it; {} where all see everything."""
    if not (family.windows and config.get("sliding_window")) or (
        family.windows == "layer_types" and not config["use_sliding_window"]
    ):
        return {}
    window, num_layers = _number(config, "sliding_window", problems), fields["num_layers"]
    layers = _windowed_layers(family, config, num_layers)
    if layers is None:
        problems.append(
            f"{family.windows} = {json.dumps(config.get(family.windows))[:80]}: must tell which of the {num_layers} layers have the window"
        )
    if not layers:
        return {}
    windowed: dict[str, Any] = {"sliding_window": window}
    for theirs, ours in SWA_HEADS.items() if family.windows == "sliding_window_layers" else ():
        count = _optional_number(config, theirs, problems)
        if count and count != fields[ours.replace("window", "num")]:
            windowed[ours] = count
    if len(windowed) > 1 or len(layers) < num_layers:
        windowed["window_layers"] = tuple(layers)
    return windowed


def _windowed_layers(
    family: Family, config: dict[str, Any], num_layers: int
) -> Sequence[int] | None:
    """None where the value makes no sense."""
    given, every = config.get(family.windows), range(num_layers)
    if family.windows == "sliding_window":
        return every
    if family.windows == "sliding_window_layers":
        fits = isinstance(given, list) and all(type(n) is int and n in every for n in given)
        return sorted(set(given or [])) if fits else None
    if given is None:  # transformers 4: the first ones see everything
        first = config["max_window_layers"]
        return every[first:] if isinstance(first, int) and first >= 0 else None
    kinds = ("sliding_attention", "full_attention")
    fits = isinstance(given, list) and all(kind in kinds for kind in given)
    if not fits or len(given) != num_layers:
        return None
    return [layer for layer in every if given[layer] == kinds[0]]


def _family_problems(family: Family, fields: dict[str, Any], config: dict[str, Any]) -> list[str]:
    problems = []
    heads, kv_heads = fields["num_heads"], fields["num_kv_heads"]
    if not fields["head_dim"] and fields["hidden_size"] % heads:
        problems.append(
            f"hidden_size = {fields['hidden_size']}: must be a multiple of num_attention_heads = {heads}"
        )
    if heads % kv_heads:
        problems.append(
            f"num_key_value_heads = {kv_heads}: must divide num_attention_heads = {heads}"
        )
    if not family.grouped and kv_heads != heads:
        problems.append(
            f"num_key_value_heads = {kv_heads}: a {family.architecture} has as many as num_attention_heads = {heads}"
        )
    if fields["tied_embeddings"] and not family.may_tie:
        problems.append(
            f"tie_word_embeddings = true: the output layer of a {family.architecture} is its own"
        )
    if family.model_type == "baichuan" and "max_position_embeddings" not in config:
        problems.append(
            "no max_position_embeddings: this is the 13B model, whose positions are ALiBi's; only rotary ones are there"
        )
    own_dim = fields["head_dim"] not in (0, fields["hidden_size"] // heads)
    if own_dim and fields.get("window_heads"):
        problems.append(
            f"head_dim = {fields['head_dim']}: must be left out where some layers have other heads, whose size is hidden_size / heads"
        )
    return problems


def disagreements(given: dict[str, Any], folder: Path, there: ModelConfig) -> list[str]:
    """Fields of [model] that are set to something else than the folder holds. KV shifting may be added to a model without it."""
    problems = []
    for name in FROM_FOLDER:
        ours, theirs = given.get(name), getattr(there, name)
        theirs = list(theirs) if isinstance(theirs, tuple) else theirs  # as a recipe has it
        ours = list(ours) if isinstance(ours, tuple) else ours
        same = (
            ours == theirs
            or (name == "vocab_size" and ours == 0)
            or (name == "kv_shift" and ours is True)
        )
        if name == "head_dim" and ours:
            same = ours == (theirs or there.hidden_size // there.num_heads)
        if name in given and not same:
            problems.append(
                f"model.{name} = {json.dumps(ours)}: the model in {folder} has {json.dumps(theirs)}; leave model.{name} out, or set it so"
            )
    return problems


def fill_model(table: dict[str, Any]) -> list[str]:
    """Puts into a recipe's tables what the folder of `model.init_from` says of the model. Returns what the recipe says otherwise."""
    section = table.get("model")
    source = section.get("init_from") if isinstance(section, dict) else None
    if not (
        isinstance(section, dict) and isinstance(source, str) and source and is_hf_folder(source)
    ):
        return []
    try:
        there = read_model(Path(source))[1]
    except ValueError as error:
        return [str(error)]
    problems = disagreements(section, Path(source), there)
    shift = section.get("kv_shift", False)
    section |= {name: getattr(there, name) for name in FROM_FOLDER}
    section["kv_shift"] = there.kv_shift or shift
    return problems


def refuse_other_model(
    model: ModelConfig, vocab_size: int, folder: Path, there: ModelConfig
) -> None:
    """Raises: ValueError that lists the fields of [model] that are not the folder's."""
    problems = disagreements(vars(model) | {"vocab_size": vocab_size}, folder, there)
    if problems:
        raise ValueError(
            "\n".join([f"{folder} holds another model:", *(f"  {p}" for p in problems)])
        )
