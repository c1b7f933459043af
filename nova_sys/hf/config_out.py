"""`[model]` to config.json of a Hugging Face folder.

What was read, with the model's own values in its places; without such a file as transformers 4 writes it, which 5 reads too.
"""

from __future__ import annotations

import json
from typing import Any

from nova_sys.config import ModelConfig
from nova_sys.hf.config_json import NAMES, ROPE_NAMES, ROPE_TYPES
from nova_sys.hf.families import FAMILIES, OPTIONS, Family

WINDOWS = {  # Family.windows: what of [model] it can say
    "": [],
    "sliding_window": ["sliding_window"],
    "layer_types": ["sliding_window", "window_layers"],
    "sliding_window_layers": ["sliding_window", "window_layers", "window_heads", "window_kv_heads"],
}


def family_for(model: ModelConfig, like: dict[str, Any]) -> Family:
    """The family that computes what `model` does: that of `like` (a config.json) if it does, else the first one.

    Raises: ValueError when there is none.
    """
    has = {option for option in OPTIONS if getattr(model, option)}
    fitting = [
        family
        for family in FAMILIES
        if set(family.has) == has
        and (family.may_tie or not model.tied_embeddings)
        and (family.grouped or model.num_kv_heads == model.num_heads)
        and _tells_windows(family, model)
    ]
    of_like = [family for family in fitting if [family.architecture] == like.get("architectures")]
    if not fitting:
        options = {**dict.fromkeys(sorted(has), True), "tied_embeddings": model.tied_embeddings}
        windows = ("sliding_window", "window_layers", "window_heads", "window_kv_heads")
        options |= {name: value for name in windows if (value := getattr(model, name))}
        described = ", ".join(
            f"model.{key} = {json.dumps(value)}" for key, value in options.items()
        )
        known = "; ".join(
            f"{f.architecture}: {', '.join([*f.has, *WINDOWS[f.windows]]) or 'none of them'}"
            for f in FAMILIES
        )
        raise ValueError(
            f"no Hugging Face architecture here computes a model with {described}, {model.num_heads} heads and {model.num_kv_heads} "
            f"key/value heads (options of each: {known}); train a model of one of them to export it"
        )
    return (of_like or fitting)[0]


def _tells_windows(family: Family, model: ModelConfig) -> bool:
    """Whether the family's configuration can say which layers of the model have a window, and which heads."""
    if not model.sliding_window:
        return True
    if model.layers_differ:
        return family.windows == "sliding_window_layers"
    if 0 < len(model.window_layers) < model.num_layers:
        return family.windows in ("layer_types", "sliding_window_layers")
    return bool(family.windows)


def write_config(
    model: ModelConfig, vocab_size: int, family: Family, dtype: str, *, like: dict[str, Any]
) -> dict[str, Any]:
    """config.json of an export; `like` is the one that the model came with, {} if it did not come from such a folder."""
    config = dict(like) if like.get("architectures") == [family.architecture] else {}
    config |= {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {theirs: getattr(model, ours) for ours, theirs in NAMES.items()}
    config["vocab_size"] = vocab_size
    if family.grouped:
        config["num_key_value_heads"] = model.num_kv_heads
    if model.head_dim or "head_dim" in config or "head_dim" in family.defaults:
        config["head_dim"] = model.head_dim or model.hidden_size // model.num_heads
    config |= {"rms_norm_eps": model.norm_eps, "tie_word_embeddings": model.tied_embeddings}
    config.setdefault("hidden_act", "silu")
    _write_windows(config, model, family)
    _write_rope(config, model)
    names = [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]
    return config | dict.fromkeys(names, dtype)


def _write_windows(config: dict[str, Any], model: ModelConfig, family: Family) -> None:
    windowed = [n for n in range(model.num_layers) if model.heads_of(n).window]
    if family.windows == "sliding_window":
        config["sliding_window"] = model.sliding_window or None
    elif family.windows == "layer_types":
        config["use_sliding_window"] = bool(windowed)
        if windowed:
            config["sliding_window"] = model.sliding_window
            config.setdefault("max_window_layers", windowed[0])  # what transformers 4 reads
            kinds = ("full_attention", "sliding_attention")
            config["layer_types"] = [kinds[n in windowed] for n in range(model.num_layers)]
    elif family.windows == "sliding_window_layers":
        config["sliding_window_layers"] = windowed
        config.setdefault("conv_window", 2)
        if windowed:
            heads = model.heads_of(windowed[0])
            config["sliding_window"] = model.sliding_window
            config["num_swa_attention_heads"] = heads.num_heads
            config["num_swa_key_value_heads"] = heads.num_kv_heads


def _write_rope(config: dict[str, Any], model: ModelConfig) -> None:
    """In the form that is there already; transformers 4's where there is none."""
    kind, read = ROPE_TYPES[model.rope_scaling]
    scaling: dict[str, Any] = {ROPE_NAMES[name]: getattr(model, name) for name in read}
    if "rope_parameters" in config:
        scaling = {"rope_type": kind, "rope_theta": model.rope_base, **scaling}
        config["rope_parameters"] = {**config["rope_parameters"], **scaling}
        return
    config["rope_theta"] = model.rope_base
    if scaling or "rope_scaling" in config:
        config["rope_scaling"] = {"rope_type": kind, **scaling} if scaling else None
