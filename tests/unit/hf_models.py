"""Small random Hugging Face folders of every family, each with a torch model of transformers that computes the same.

transformers has no Baichuan by itself. Its models here are Llamas of transformers with the parts that differ put in their places
(NormHead; the shift behind the projections of keys and values), saved under Baichuan's names.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import linear, normalize
from transformers.models.llama import modeling_llama

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

VOCAB, POSITIONS = 300, 256
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,  # not a multiple of 128: our rows are padded
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
WINDOW = 37
"""Tokens; `probe_ids` are more."""
WINDOWS = {"use_sliding_window": True, "sliding_window": WINDOW}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-linear": ("Llama", {"rope_parameters": LINEAR, "num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2", WINDOWS | {"max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-windows": (
        "Qwen3",
        WINDOWS | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "baichuan": ("Llama", {"num_key_value_heads": 4}),
    "baichuan-m1": ("Llama", {}),
    "baichuan-m1-windows": ("Llama", {}),
}
M1_WINDOWS = {
    "sliding_window_layers": [1, 3],
    "sliding_window": WINDOW,
    "num_swa_attention_heads": 8,
    "num_swa_key_value_heads": 4,
}
"""More heads than the other layers, and smaller ones."""
TEMPLATE = """\
{%- for m in messages %}
{{- '<|im_start|>' + m['role'] + '\\n' }}
{%- if m['role'] == 'assistant' %}
{%- generation %}{{ m['content'] | trim + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


class Reference(NamedTuple):
    """folder: the Hugging Face folder.   model: computes what its weights mean, with transformers."""

    name: str
    folder: Path
    model: Any

    def tensors(self, of: Callable[[torch.Tensor], Any] = torch.Tensor.detach) -> dict[str, Any]:
        """By the names of the folder, what `of` gives for each parameter (the value, or its gradient)."""
        found = {name: of(p) for name, p in self.model.named_parameters()}
        return found if "baichuan" not in self.name else _baichuan_names(found)


class NormHead(torch.nn.Module):
    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, normalize(self.weight))


class Shifted(torch.nn.Module):
    """A projection to keys or values, mixed with the token before: conv[..., 0] weighs that one."""

    def __init__(self, projection: torch.nn.Linear, heads: int) -> None:
        super().__init__()
        self.projection = projection
        self.conv = torch.nn.Parameter(torch.rand(1, 1, heads, 1, 2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        now = self.projection(hidden).unflatten(-1, (self.conv.shape[2], -1))
        before = torch.nn.functional.pad(now, (0, 0, 0, 0, 1, 0))[:, :-1]
        return (self.conv[..., 0] * before + self.conv[..., 1] * now).flatten(-2)


class Windowed(torch.nn.Module):
    """A layer's attention with a window, and with heads of its own: its own positions, because the size of a head is another."""

    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": None}
        own = type(config)(**{**config.to_dict(), **heads})
        own._attn_implementation = "eager"
        self.attention = modeling_llama.LlamaAttention(own, layer)
        for weight in self.attention.parameters():
            torch.nn.init.normal_(weight, std=SHAPE["initializer_range"])
        self._rotary = [
            modeling_llama.LlamaRotaryEmbedding(own)
        ]  # a list: nothing of it is a weight

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> Any:
        place = torch.arange(hidden_states.shape[1])
        distance = place[:, None] - place
        unseen = (distance < 0) | (distance >= WINDOW)
        mask = torch.zeros(unseen.shape).masked_fill(unseen, -torch.inf)[None, None]
        positions = self._rotary[0](hidden_states, place[None])
        return self.attention(hidden_states, position_embeddings=positions, attention_mask=mask)


def make(name: str, folder: Path) -> Reference:
    """A folder with weights, config.json and a tokenizer. Norms and biases are random too, so that one left out shows."""
    kind, options = OPTIONS[name]
    torch.manual_seed(sorted(OPTIONS).index(name))
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in key), std=0.2)
    model.save_pretrained(folder)
    for layer in M1_WINDOWS["sliding_window_layers"] if name == "baichuan-m1-windows" else ():
        model.model.layers[layer].self_attn = Windowed(config, layer)
    if "baichuan" in name:
        _make_baichuan(name, folder, model)
    make_tokenizer(folder)
    return Reference(name, folder, model)


def _make_baichuan(name: str, folder: Path, model: Any) -> None:
    model.lm_head = NormHead(model.lm_head.weight)
    model.lm_head.weight.data *= 40  # normalised rows are short: else all logits are nearly equal
    for layer in model.model.layers if "m1" in name else ():
        attention = getattr(layer.self_attn, "attention", layer.self_attn)
        for which in ("k_proj", "v_proj"):
            heads = attention.config.num_key_value_heads
            setattr(attention, which, Shifted(getattr(attention, which), heads))
    weights = {key: p.detach() for key, p in model.named_parameters()}
    save_file(_baichuan_names(weights), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "torch_dtype": "float32"}
    if name == "baichuan":
        config |= {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan"}
        del config["num_key_value_heads"]
    else:
        config |= {"architectures": ["BaichuanM1ForCausalLM"], "model_type": "baichuan_m1"}
        config |= {"sliding_window_layers": [], "sliding_window": 128, "conv_window": 2}
        config |= M1_WINDOWS if "windows" in name else {}
        del config["head_dim"]
    (folder / "config.json").write_text(json.dumps(config))


def _baichuan_names(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    wrappers = (".projection", ".attention")
    for wrapper in wrappers:
        named = {key.replace(wrapper, ""): value for key, value in named.items()}
    packed = {}
    for key in [key for key in named if "q_proj" in key]:
        parts = [
            named.pop(key.replace("q_proj", which)) for which in ("q_proj", "k_proj", "v_proj")
        ]
        packed[key.replace("q_proj", "W_pack")] = torch.cat(parts)
    for which in "kv":
        for key in [key for key in named if f"{which}_proj.conv" in key]:
            packed[key.replace(f"{which}_proj.conv", f"conv_{which}")] = named.pop(key)
    return {**named, **packed}


def make_tokenizer(folder: Path) -> None:
    """One id per byte, and special tokens; a template that marks what the assistant says."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    # an id for every row of the model: generation leaves out rows that no text has
    tokenizer.add_tokens([f"<extra {i}>" for i in range(tokenizer.get_vocab_size(), VOCAB)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def probe_ids(length: int = 120) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(9)).tolist()


def reference_logits(reference: Reference, ids: list[int]) -> torch.Tensor:
    """(len(ids), V) fp32, with gradients."""
    return reference.model(torch.tensor([ids])).logits[0]
