"""The rules of `[model]`, for `config_rules`."""

from __future__ import annotations

from nova_sys.config import ModelConfig, RunConfig

ROPE_SCALING_READS = {  # options of [model] that each model.rope_scaling reads
    "none": (),
    "linear": ("rope_factor",),
    "llama3": (
        "rope_factor",
        "rope_low_freq_factor",
        "rope_high_freq_factor",
        "rope_original_positions",
    ),
}


def model_problems(config: RunConfig) -> list[str]:
    model, problems = config.model, []
    if model.num_heads % model.num_kv_heads:
        problems.append(
            f"model.num_kv_heads = {model.num_kv_heads}: must divide model.num_heads = "
            f"{model.num_heads}; choose one of {divisors(model.num_heads)}"
        )
    head_dim = model.head_dim or model.hidden_size // model.num_heads
    if model.head_dim == 0 and model.hidden_size % model.num_heads:
        problems.append(
            f"model.hidden_size = {model.hidden_size}: must be a multiple of model.num_heads = "
            f"{model.num_heads} when model.head_dim is 0; change one of them, or set model.head_dim"
        )
    elif head_dim % 2:
        problems.append(
            f"model.head_dim = {head_dim}: must be even, because rotary positions turn pairs of "
            f"channels; set model.head_dim to {head_dim + 1}"
        )
    if model.kv_shift_init == "random" and not model.kv_shift:
        problems.append(
            'model.kv_shift_init = "random": has no effect while model.kv_shift is false; '
            "set model.kv_shift to true, or leave model.kv_shift_init out"
        )
    return problems + _window_problems(config) + _rope_problems(model)


def heads_of_all_layers(model: ModelConfig) -> dict[str, int]:
    """Every number of heads that some layer has, by its key: what must divide among ranks."""
    heads = {"model.num_heads": model.num_heads, "model.num_kv_heads": model.num_kv_heads}
    others = {
        "model.window_heads": model.window_heads,
        "model.window_kv_heads": model.window_kv_heads,
    }
    return heads | {key: count for key, count in others.items() if count}


def _window_problems(config: RunConfig) -> list[str]:
    model, problems = config.model, []
    layers = model.window_layers
    given = {
        "window_layers": list(layers),
        "window_heads": model.window_heads,
        "window_kv_heads": model.window_kv_heads,
    }
    if not model.sliding_window:
        problems += [
            f"model.{key} = {value}: has no effect while model.sliding_window is 0; set that to the tokens that a token sees, or leave "
            f"model.{key} out"
            for key, value in given.items()
            if value
        ]
    elif not layers:
        problems += [
            f"model.{key} = {given[key]}: has no effect without model.window_layers; list the layers that it is about"
            for key in ("window_heads", "window_kv_heads")
            if given[key]
        ]
    if sorted(set(layers)) != list(layers) or any(
        not 0 <= layer < model.num_layers for layer in layers
    ):
        problems.append(
            f"model.window_layers = {list(layers)}: must name layers from 0 to {model.num_layers - 1}, each once and in order"
        )
    heads, kv_heads = (
        model.window_heads or model.num_heads,
        model.window_kv_heads or model.num_kv_heads,
    )
    if model.layers_differ and heads % kv_heads:
        problems.append(
            f"model.window_kv_heads = {kv_heads}: must divide the {heads} heads of these layers; choose one of {divisors(heads)}"
        )
    if model.window_heads and model.head_dim:
        problems.append(
            f"model.head_dim = {model.head_dim}: must be left out where model.window_heads is set, because heads of several sizes are "
            "hidden_size / heads each"
        )
    if config.train.kernels == "cuda" and 0 < model.sliding_window < config.data.pack_length:
        problems.append(
            f'train.kernels = "cuda": its attention knows no window, and data.pack_length = {config.data.pack_length} is more than '
            f'model.sliding_window = {model.sliding_window}; use "triton" or "auto", or shorter packs'
        )
    if model.window_heads and (model.hidden_size % heads or model.hidden_size // heads % 2):
        problems.append(
            f"model.window_heads = {heads}: must divide model.hidden_size = {model.hidden_size} into heads of an even size; change one of them"
        )
    return problems


def _rope_problems(model: ModelConfig) -> list[str]:
    """Every key of the scaling that is set must be read, and llama3's must make sense."""
    read = ROPE_SCALING_READS[model.rope_scaling]
    problems = [
        f"model.{key} = {getattr(model, key)}: has no effect with model.rope_scaling = "
        f'"{model.rope_scaling}"; leave it out, or change model.rope_scaling'
        for key in ROPE_SCALING_READS["llama3"]
        if key not in read and getattr(model, key) != getattr(ModelConfig(), key)
    ]
    if model.rope_scaling != "llama3":
        return problems
    if model.rope_original_positions == 0:
        problems.append(
            'model.rope_original_positions = 0: model.rope_scaling = "llama3" needs the context '
            "length before it was stretched; set it (8192 for Llama 3.1)"
        )
    if model.rope_low_freq_factor >= model.rope_high_freq_factor:
        problems.append(
            f"model.rope_low_freq_factor = {model.rope_low_freq_factor}: must be below "
            f"model.rope_high_freq_factor = {model.rope_high_freq_factor}; lower it"
        )
    return problems


def divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
