"""Files that users have, and small harms to them: for test_fuzz_readers.py. Everything is a function of the random generator."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "2+2?"}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": '{"a": "\\u00e9"}'}}],
    },
    {"role": "tool", "content": "4", "name": "add"},
    {"role": "assistant", "content": "It is 4 \U0001f642"},
]
START = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
RECORDS: list[Any] = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "5", "score": 1.5},
    {"prompt": TURNS[:2], "chosen": TURNS[2:3], "rejected": "no", "tools": [{"name": "add"}]},
    {"chosen": START + " yes\n\nHuman: d", "rejected": START + " no"},
    {"chosen": TURNS[:4] + TURNS[4:], "rejected": [*TURNS[:4], TURNS[4] | {"content": "It is 5"}]},
    {"messages": TURNS, "tools": [{"name": "add", "parameters": {"a": [1, None, True]}}]},
]
BRACKETS = """{{ bos_token }}{%- for m in messages %}{%- if m['role'] == 'assistant' %}
{{- ' ' + m['content'] | trim + eos_token + '\\n' }}{%- else %}{{- '[' + m.role + '] ' + m['content'] + ' [/]' }}
{%- endif %}{%- endfor %}{# a comment #}"""
RECIPE = """# a run
[run]
dir = "runs/x"
[model]
num_layers = 4
vocab_size = 4096
norm_head = true
[data]
train = ["a.jsonl", "b*.gz"]
[optimizer]
lr = 1e-4
betas = [0.9, 0.95]
[log]
profile_steps = [10, 12]
"""
INSERTS = [
    b"\0", b"\xef\xbb\xbf", b"\r\n", b"\r", b"\n", b"\xed\xa0\x80", b"\xff", b'"', b"\\", b"\\ud800", b"\\u0000", b"{", b"}",
    b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"1e999", b"NaN", b"x" * 70_000, "\u2028".encode(), "\x85".encode(), b"{%", b"{{", b"%}",
    b"{% generation %}", b"=", b"[x]\n", b" ", b"# ", b"true", b"-0", b"\x1f\x8b", b"PK\x03\x04", b"0x" + b"f" * 5000,
]  # fmt: skip
ODD: list[Any] = [
    None, True, -1, 1.5, 10**400, float("nan"), "", " ", "\ud800", "a\0b", "\u2581", [], [[]], {}, {"a": None}, [None], "x" * 5000,
    "user", "\n\nAssistant:", ["a"], [{"role": "assistant", "content": ""}], 2**31, 4_000_000_000, -(2**63),
]  # fmt: skip
DEEP = "a list in a list in a list"
"""Stands for one too deep for json.dumps to write."""


def spans(rng: random.Random, size: int) -> tuple[int, int]:
    start = rng.randrange(size + 1)
    return start, min(size, start + rng.choice([1, 2, 7, 100, size]))


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One small harm to a file."""
    start, stop = spans(rng, len(data))
    kind = rng.randrange(7)
    if kind == 0 and start < len(data):
        flipped = data[start] ^ (1 << rng.randrange(8))
        return data[:start] + bytes([flipped]) + data[start + 1 :]
    if kind == 1:
        return data[:start]
    if kind == 2:
        return data[:start] + data[stop:]
    if kind == 3:
        return data[:stop] + data[start:]
    if kind == 4:
        return data[:start] + rng.randbytes(rng.randrange(1, 9)) + data[stop:]
    if kind == 5:
        return data.replace(b"\n", rng.choice([b"\r\n", b"\r", b"\n\n", b" "]))
    return data[:start] + rng.choice(INSERTS) + data[start:]


def mutate_json(value: Any, rng: random.Random) -> Any:
    """The value with one node anywhere in it replaced, removed, doubled, wrapped or renamed."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice([*ODD, DEEP, [value], {"role": value}])
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key = rng.choice(keys)
    changed = dict(value) if isinstance(value, dict) else list(value)
    kind = rng.randrange(6)
    if kind == 0:
        del changed[key]
    elif kind == 1 and isinstance(changed, list):
        changed.insert(key, changed[key])
    elif kind == 1:
        changed[rng.choice(["prompt", "chosen", "role", "content", "vocab", "\ud800"])] = value[key]
    else:
        changed[key] = mutate_json(value[key], rng)
    return changed


def as_line(value: Any, rng: random.Random) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1:  # a key twice
        text = text.replace('{"', '{"chosen": "x", "', 1)
    depth = rng.choice([100, 500, 900, 5000])
    text = text.replace(f'"{DEEP}"', "[" * depth + "]" * depth)
    return text.encode("utf-8", "surrogatepass") + rng.choice([b"\n", b"\n", b"\r\n", b"\n\n", b""])


def data_file(rng: random.Random, kind: str = "") -> bytes:
    """kind: of records that fit together before they are harmed; any if empty."""
    seeds = {"": RECORDS, "pairs": RECORDS[:4], "sft": RECORDS[4:]}[kind]
    records = rng.choices(seeds, k=rng.randrange(1, 4))
    for _ in range(rng.choice([0, 1, 1, 3])):
        place = rng.randrange(len(records))
        records[place] = mutate_json(records[place], rng)
    data = b"".join(as_line(record, rng) for record in records)
    for _ in range(rng.choice([0, 0, 1, 3])):
        data = mutate_bytes(data, rng)
    if rng.random() < 0.2:
        data = gzip.compress(data, mtime=0)
        data = mutate_bytes(data, rng) if rng.random() < 0.7 else data
    return data.decode("utf-8", "replace").encode("utf-16") if rng.random() < 0.02 else data


def mutated(data: bytes, rng: random.Random, most: int = 3) -> bytes:
    for _ in range(rng.randrange(1, most + 1)):
        data = mutate_bytes(data, rng)
    return data


def hugging_face_files(texts: list[str]) -> dict[str, Any]:
    """A small tokenizer with its configuration, as JSON values by file name."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    model.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<s>", "</s>"]
    model.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    return {
        "tokenizer.json": json.loads(model.to_str()),
        "tokenizer_config.json": {
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "chat_template": [{"name": "default", "template": BRACKETS}],
        },
    }


def hugging_face_model(folder: Path) -> dict[str, bytes]:
    """Writes a model of two layers, its tensors in two files, and gives the files."""
    import torch
    from safetensors.torch import save_file

    from nova_sys.hf.config_json import read_model
    from nova_sys.hf.families import dims_of, shape_of, table_of

    folder.mkdir()
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"rope_theta": 500.0, "original_max_position_embeddings": 64}
    config = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 40}
    config |= {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 4}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope}
    config |= {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps(config))
    family, model = read_model(folder)
    files: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for row in table_of(family, model):
        shape = shape_of(row.shape, dims_of(model, model.vocab_size))
        for name in [row.in_layer(i) for i in range(2)] if row.in_layers else [row.name]:
            files["b.safetensors" if "mlp" in name else "a.safetensors"][name] = torch.ones(shape)
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    index = {"weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return {path.name: path.read_bytes() for path in folder.iterdir()}
