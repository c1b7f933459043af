"""The families of models as tables: what each tensor of a Hugging Face folder is called, its shape, and where it lies in ours.

Shapes are written in these letters; a product stands without a sign, "NH+2KH" is a sum.
D hidden, N query heads, K key/value heads, H head dim, F ffn, V vocabulary (Megatron's is padded).

Our tensors are Megatron's, by their global names without a layer's number (weight_names.py). Two of them hold several of theirs:
    linear_qkv  for each key/value head: its N/K query heads, its key, its value
    linear_fc1  gate, then up
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from nova_sys.config import VOCAB_MULTIPLE, ModelConfig
from nova_sys.weight_names import LAYER

QKV, PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"

OUR_SHAPES = {  # by the end of the name; the vocabulary without its padding
    "word_embeddings.weight": "V D",
    "linear_qkv.weight": "NH+2KH D",
    "linear_qkv.bias": "NH+2KH",
    "linear_proj.weight": "D NH",
    "linear_fc1.weight": "2F D",
    "linear_fc2.weight": "D F",
    "q_layernorm.weight": "H",
    "k_layernorm.weight": "H",
    "k_mix_K2": "K 2",
    "v_mix_K2": "K 2",
    "layernorm.weight": "D",
    "output_layer.weight": "V D",
}


@dataclass(frozen=True)
class Row:
    """One line of a table: a tensor of the folder, whose rows are `parts` of `ours`, one after the other."""

    name: str
    """In the folder; `*` is the layer's number."""
    shape: str
    ours: str
    parts: str = "all"

    @property
    def in_layers(self) -> bool:
        return "*" in self.name

    def in_layer(self, layer: int | None) -> str:
        return self.name if layer is None else self.name.replace("*", str(layer))


def _rows(prefix: str, ours: str, table: list[tuple[str, str, str, str]]) -> list[Row]:
    return [Row(prefix + name, shape, ours + our, parts) for name, shape, our, parts in table]


AROUND = [
    Row("model.embed_tokens.weight", "V D", "embedding.word_embeddings.weight"),
    Row("model.norm.weight", "D", "decoder.final_layernorm.weight"),
    Row("lm_head.weight", "V D", "output_layer.weight"),
]
LAYERS = "model.layers.*."
MLP = _rows(LAYERS, LAYER, [
    ("input_layernorm.weight",          "D",   "input_layernorm.weight",   "all"),
    ("self_attn.o_proj.weight",         "D NH", f"{PROJ}.weight",          "all"),
    ("post_attention_layernorm.weight", "D",   "pre_mlp_layernorm.weight", "all"),
    ("mlp.gate_proj.weight",            "F D", "mlp.linear_fc1.weight",    "gate"),
    ("mlp.up_proj.weight",              "F D", "mlp.linear_fc1.weight",    "up"),
    ("mlp.down_proj.weight",            "D F", "mlp.linear_fc2.weight",    "all"),
])  # fmt: skip
SPLIT_QKV = _rows(LAYERS + "self_attn.", LAYER, [
    ("q_proj.weight", "NH D", f"{QKV}.weight", "q"),
    ("k_proj.weight", "KH D", f"{QKV}.weight", "k"),
    ("v_proj.weight", "KH D", f"{QKV}.weight", "v"),
])  # fmt: skip
PACKED_QKV = _rows(LAYERS + "self_attn.", LAYER, [
    ("W_pack.weight", "NH+2KH D", f"{QKV}.weight", "q k v"),
])  # fmt: skip
QKV_BIAS = _rows(LAYERS + "self_attn.", LAYER, [
    ("q_proj.bias", "NH", f"{QKV}.bias", "q"),
    ("k_proj.bias", "KH", f"{QKV}.bias", "k"),
    ("v_proj.bias", "KH", f"{QKV}.bias", "v"),
])  # fmt: skip
QK_NORM = _rows(LAYERS + "self_attn.", LAYER + "self_attention.", [
    ("q_norm.weight", "H", "q_layernorm.weight", "all"),
    ("k_norm.weight", "H", "k_layernorm.weight", "all"),
])  # fmt: skip
KV_SHIFT = _rows(LAYERS + "self_attn.", LAYER + "self_attention.core_attention.", [
    # index 0 weighs the token before, index 1 the token itself, here and there
    ("conv_k", "1 1 K 1 2", "k_mix_K2", "all"),
    ("conv_v", "1 1 K 1 2", "v_mix_K2", "all"),
])  # fmt: skip


@dataclass(frozen=True)
class Family:
    """architecture: as in config.json.   has: the options of [model] that all its models have, the others are off.
    may_tie: its models may share the embeddings with the output layer.   grouped: it may have fewer key/value heads.
    own_code: transformers has no such model by itself, its folders bring the code.
    windows: the key of config.json that tells which layers have a sliding window (sliding_window itself: all); empty: none ever.
    defaults: what transformers takes for a key that config.json leaves out, where that is not off or none."""

    architecture: str
    model_type: str
    table: list[Row]
    has: tuple[str, ...] = ()
    may_tie: bool = True
    grouped: bool = True
    own_code: bool = False
    windows: str = ""
    defaults: dict[str, int] = field(default_factory=dict)


QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = [
    Family("LlamaForCausalLM", "llama", [*AROUND, *SPLIT_QKV, *MLP]),
    Family(
        "MistralForCausalLM",
        "mistral",
        [*AROUND, *SPLIT_QKV, *MLP],
        windows="sliding_window",
        defaults={"sliding_window": 4096},
    ),
    Family(
        "Qwen2ForCausalLM",
        "qwen2",
        [*AROUND, *SPLIT_QKV, *QKV_BIAS, *MLP],
        has=("qkv_bias",),
        windows="layer_types",
        defaults=QWEN_WINDOWS,
    ),
    Family(
        "Qwen3ForCausalLM",
        "qwen3",
        [*AROUND, *SPLIT_QKV, *QK_NORM, *MLP],
        has=("qk_norm",),
        windows="layer_types",
        defaults={"head_dim": 128} | QWEN_WINDOWS,
    ),
    Family(
        "BaichuanForCausalLM",
        "baichuan",
        [*AROUND, *PACKED_QKV, *MLP],
        has=("norm_head",),
        may_tie=False,
        own_code=True,
        grouped=False,
    ),
    Family(
        "BaichuanM1ForCausalLM",
        "baichuan_m1",
        [*AROUND, *PACKED_QKV, *KV_SHIFT, *MLP],
        has=("norm_head", "kv_shift"),
        may_tie=False,
        own_code=True,
        windows="sliding_window_layers",
    ),
]
OPTIONS = ("qkv_bias", "qk_norm", "norm_head", "kv_shift")
"""What tells families apart."""


def dims_of(model: ModelConfig, vocab_size: int, layer: int | None = None) -> dict[str, int]:
    """The letters' values, in a layer; for a tensor of no layer any will do."""
    heads = model.heads_of(layer or 0)
    return {
        "D": model.hidden_size,
        "N": heads.num_heads,
        "K": heads.num_kv_heads,
        "H": heads.head_dim,
        "F": model.ffn_hidden_size,
        "V": vocab_size,
    }


def shape_of(shape: str, dims: dict[str, int]) -> tuple[int, ...]:
    return tuple(
        sum(
            math.prod(int(f) if f.isdigit() else dims[f] for f in re.findall(r"\d+|\w", term))
            for term in size.split("+")
        )
        for size in shape.split()
    )


def table_of(family: Family, model: ModelConfig) -> list[Row]:
    """The tensors of one model of the family: tied embeddings have no output layer of their own."""
    return [row for row in family.table if not (model.tied_embeddings and "output" in row.ours)]


def our_shape(ours: str, dims: dict[str, int], *, padded: bool) -> tuple[int, ...]:
    """Of a whole tensor of ours (of one layer)."""
    ending = next(ending for ending in OUR_SHAPES if ours.endswith(ending))
    if padded:
        dims = dims | {"V": math.ceil(dims["V"] / VOCAB_MULTIPLE) * VOCAB_MULTIPLE}
    return shape_of(OUR_SHAPES[ending], dims)


@dataclass(frozen=True)
class Block:
    """`num_rows` rows that begin at row `theirs` of a tensor of the folder and at row `ours` of ours."""

    theirs: int
    ours: int
    num_rows: int


def blocks_of(row: Row, dims: dict[str, int]) -> Iterator[Block]:
    """Which rows of the folder's tensor are which of ours, in the order of the folder's."""
    theirs = 0
    for part in row.parts.split():
        for start, num_rows in _part(part, row.ours, dims):
            yield Block(theirs, start, num_rows)
            theirs += num_rows


def _part(part: str, ours: str, dims: dict[str, int]) -> list[tuple[int, int]]:
    """(first row, number of rows) of a part in our tensor."""
    if part == "all":
        return [(0, our_shape(ours, dims, padded=False)[0])]
    if part in ("gate", "up"):
        return [(dims["F"] * (part == "up"), dims["F"])]
    kv_heads, dim = dims["K"], dims["H"]
    queries = dims["N"] // kv_heads * dim
    first, num_rows = {"q": (0, queries), "k": (queries, dim), "v": (queries + dim, dim)}[part]
    return [(head * (queries + 2 * dim) + first, num_rows) for head in range(kv_heads)]
