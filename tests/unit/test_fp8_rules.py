"""What `[fp8]` refuses: shapes, layers, keys without effect, machines."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nova_sys.config import Fp8Config
from nova_sys.config_io import check, load_recipe
from nova_sys.model import te

SMALL = {
    "model.num_layers": 3,
    "model.hidden_size": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_hidden_size": 48,
    "model.vocab_size": 300,
    "data.train": "pairs.jsonl",
    "data.pack_length": 128,
    "train.precision": "fp8",
}


def refusal(folder: Path, world: int = 1, **overrides: Any) -> str:
    recipe = folder / "recipe.toml"
    recipe.write_text("")
    own = {key.replace("__", "."): value for key, value in overrides.items()}
    settings = SMALL | {"train.global_batch_packs": world} | own
    with pytest.raises(ValueError) as caught:
        check(load_recipe(recipe, [f"{k}={json.dumps(v)}" for k, v in settings.items()]), world)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"model__hidden_size": 40, "model__head_dim": 8}, ["model.hidden_size = 40", "multiple of 16", "for example to give 48"]),
        ({"model__ffn_hidden_size": 56}, ["model.ffn_hidden_size = 56", "multiple of 16"]),
        ({"data__pack_length": 120}, ["data.pack_length = 120", "multiple of 16", "128"]),
        ({"model__head_dim": 6}, ["4 query heads of 6, which is 24", "multiple of 16", "give 32"]),
        ({"fp8__recipe": "delayed", "fp8__first_layers_bf16": 1}, ["fp8.first_layers_bf16 = 1", 'must be 0 or "auto"', "another fp8.recipe"]),
        ({"fp8__first_layers_bf16": 2}, ["= 2 + 1", "below model.num_layers = 3", "lower them"]),
        ({"fp8__param_gather": True, "parallel__distributed_optimizer": False}, ["fp8.param_gather = true", "distributed_optimizer = true"]),
        ({"fp8__param_gather": True, "fp8__recipe": "delayed"}, ["fp8.param_gather = true", 'fp8.recipe = "delayed"', "another fp8.recipe"]),
        ({"algo__reference": "host"}, ['algo.reference = "host"', "keeps the rounded weights", 'use "cache"']),
        ({"fp8__last_layers_bf16": -1}, ["fp8.last_layers_bf16 = -1", "0 or more"]),
        ({"train__precision": "bf16", "fp8__recipe": "delayed"}, ['fp8.recipe = "delayed"', 'train.precision = "bf16"', "leave it out"]),
    ],
)  # fmt: skip
def test_rules(overrides: dict[str, Any], parts: list[str], tmp_path: Path) -> None:
    message = refusal(tmp_path, **overrides)
    assert all(part in message for part in parts), message


def test_rules_of_a_layout(tmp_path: Path) -> None:
    split = refusal(tmp_path, 2, parallel__tensor=2)
    assert "model.ffn_hidden_size = 48 / parallel.tensor = 2, which is 24" in split
    gathered = refusal(tmp_path, 2, parallel__tensor=2, parallel__sequence=True, model__ffn_hidden_size=64)  # fmt: skip
    assert "data.pack_length = 128 / (parallel.context = 1 * parallel.tensor = 2), which is 64: must be a multiple of 128" in gathered  # fmt: skip
    assert "model.hidden_size = 32, which is 32: must be a multiple of 128" in gathered
    stages = refusal(tmp_path, 3, parallel__pipeline=3, fp8__first_layers_bf16=0, fp8__last_layers_bf16=2)  # fmt: skip
    assert "fp8.last_layers_bf16 = 2: must not exceed the 1 layers of a pipeline stage" in stages


def test_what_an_fp8_run_needs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    te.check_precision("bf16", Fp8Config(), cpu)
    with pytest.raises(ValueError) as caught:
        te.check_precision("fp8", Fp8Config(), cpu)
    message = str(caught.value)
    for part in ("capability 9.0 or more, and this process runs on the CPU", "needs Transformer Engine, which is not installed", "README", '"bf16"'):  # fmt: skip
        assert part in message
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(te.torch.cuda, "get_device_capability", lambda _: (8, 9))
    broken = RuntimeError("undefined symbol: cublasLtGroupedMatrixLayoutInit_internal")

    def load(_: str) -> None:
        raise broken

    monkeypatch.setattr(importlib, "import_module", load)
    with pytest.raises(
        ValueError, match=r"and this one has 8\.9, and needs .* does not load \(undefined symbol"
    ):
        te.check_precision("fp8", Fp8Config(), gpu)
    reason = "FP8 block scaled GEMM requires compute capability 9.0 or higher and CUDA >= 12.9."
    engine = SimpleNamespace(
        is_fp8_available=lambda return_reason: (True, ""),
        is_fp8_block_scaling_available=lambda return_reason: (False, reason),
    )
    monkeypatch.setattr(importlib, "import_module", lambda _: engine)
    te.check_precision("fp8", Fp8Config(recipe="delayed"), gpu)
    monkeypatch.setattr(te.torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(
        ValueError, match=r"refused by Transformer Engine: .* CUDA >= 12\.9; or set"
    ):
        te.check_precision("fp8", Fp8Config(), gpu)
