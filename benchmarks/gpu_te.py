"""Does Transformer Engine work here, and our model on it? `python benchmarks/gpu_te.py --out FILE.json`, a part of gpu_check.py.

Every check compares outputs and gradients with plain torch in fp32 (`error`: |a - b| / |b| as norms, the largest of them). Ours: a few DPO steps of
a small model in FP8 beside the same steps in bf16. A check that fails does not stop the others.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from gpu_workload import TINY, Lengths, quick_weights, recipe, write_pairs

from nova_sys.parallel import parallel_run
from nova_sys.trainer import Trainer

BF16_ERROR, FP8_ERROR = 0.02, 0.12
"""Allowed: e4m3 has 3 bits after the point, so a rounded operand is off by 2% on average, and a product of two of them has few terms more."""
RECIPES = {  # ours -> Transformer Engine's class
    "delayed": "DelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
}
LARGEST_LOSS_DIFFERENCE = 0.05
STEPS = 4
Check = Callable[[], dict[str, Any]]


def error_of(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    errors = [float((a.detach().float() - b.detach()).norm() / b.norm()) for a, b in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def layer_check(kind: str, recipe_class: str | None) -> dict[str, Any]:
    """Forward and backward of te.Linear or te.LayerNormLinear; the third of three, so that delayed scaling has a history."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]
    from transformer_engine.common import recipe as recipes  # pyright: ignore[reportMissingImports]

    options = {"params_dtype": torch.bfloat16, "device": "cuda", "bias": False}
    options |= {"normalization": "RMSNorm"} if kind == "LayerNormLinear" else {}
    layer = getattr(te, kind)(1024, 768, **options)
    given = getattr(recipes, recipe_class)() if recipe_class else None
    for _ in range(3):
        layer.zero_grad(set_to_none=True)
        x = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        dy = torch.randn(512, 768, device="cuda", dtype=torch.bfloat16)
        with te.fp8_autocast(enabled=given is not None, fp8_recipe=given):
            y = layer(x)
        y.backward(dy)
    x_32, w_32 = (t.detach().float().requires_grad_() for t in (x, layer.weight))
    normed = F.rms_norm(x_32, (1024,), eps=1e-5) if kind == "LayerNormLinear" else x_32
    y_32 = F.linear(normed, w_32)
    y_32.backward(dy.float())
    assert x_32.grad is not None and w_32.grad is not None
    pairs = [(y, y_32), (x.grad, x_32.grad), (layer.weight.grad, w_32.grad)]
    allowed = FP8_ERROR if recipe_class else BF16_ERROR
    error = error_of(pairs)
    return {"ok": error < allowed, "error": error, "allowed": allowed}


def our_losses(precision: str, fp8_recipe: str | None, device: torch.device) -> list[float]:
    """Of the first DPO steps of a small model. Its first and last layer stay in bf16, so it has four."""
    settings = dict(TINY)
    if device.type == "cuda":
        settings |= {"model.num_layers": 4, "model.hidden_size": 512, "model.num_heads": 8}
        settings |= {"model.num_kv_heads": 4, "model.ffn_hidden_size": 1024}
        settings |= {"train.precision": precision, "optimizer.lr": 1e-4}
    settings |= {"fp8.recipe": fp8_recipe} if fp8_recipe else {}
    settings |= {"train.check_first_loss": False}
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder), Lengths(4.0, 0.5, 12, 200, 60), settings["model.vocab_size"])
        config = recipe(Path(folder), settings)
        with (
            mock.patch("nova_sys.model.build.initialize_weights", quick_weights),
            parallel_run(config.parallel, seed=config.train.seed) as parallel,
        ):
            trainer = Trainer(config, parallel)
            records: list[dict[str, Any]] = []
            trainer.telemetry.step = lambda record, histograms=None: records.append(dict(record))
            trainer.loader.start(0)
            try:
                for step in range(STEPS):
                    trainer._one_step(step)
            finally:
                trainer.loader.stop()
    return [record["loss"] for record in records]


def our_check(fp8_recipe: str, known: dict[str, list[float]]) -> dict[str, Any]:
    device = torch.device("cuda")
    if "bf16" not in known:
        known["bf16"] = our_losses("bf16", None, device)
    losses = our_losses("fp8", fp8_recipe, device)
    difference = max(abs(a - b) for a, b in zip(losses, known["bf16"], strict=True))
    ok = difference < LARGEST_LOSS_DIFFERENCE and abs(losses[0] - math.log(2)) < 1e-2
    return {"ok": ok, "losses": losses, "bf16_losses": known["bf16"], "difference": difference}


def checks() -> Iterator[tuple[str, Check]]:
    for kind in ("Linear", "LayerNormLinear"):
        yield f"te.{kind} in bf16", lambda kind=kind: layer_check(kind, None)
        for name in RECIPES.values():
            yield f"te.{kind} in {name}", lambda kind=kind, name=name: layer_check(kind, name)
    known: dict[str, list[float]] = {}
    for name in RECIPES:
        yield f"our DPO steps, {name}", lambda name=name: our_check(name, known)


def run_checks(out: Path, record: dict[str, Any]) -> bool:
    for name, check in checks():
        began_s = time.perf_counter()
        try:
            result = check()
        except Exception as error:
            result = {"ok": False, "why": f"{type(error).__name__}: {str(error)[:500]}"}
        record["checks"][name] = result | {"seconds": round(time.perf_counter() - began_s, 2)}
        out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{'ok  ' if result['ok'] else 'FAIL'} {name}: {result}", flush=True)
    return all(result["ok"] for result in record["checks"].values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--simulate", action="store_true", help="our steps alone, on a CPU")
    arguments = parser.parse_args()
    if arguments.simulate:
        record = {"losses": our_losses("fp32", None, torch.device("cpu"))}
        arguments.out.write_text(json.dumps(record) + "\n")
        return int(abs(record["losses"][0] - math.log(2)) > 1e-5)
    if importlib.util.find_spec("transformer_engine") is None:
        said = {"skipped": "Transformer Engine is not installed; docs/gpu.md says how"}
        arguments.out.write_text(json.dumps(said) + "\n")
        return 0
    import transformer_engine  # pyright: ignore[reportMissingImports]

    record = {"version": transformer_engine.__version__, "checks": {}}
    return int(not run_checks(arguments.out, record))


if __name__ == "__main__":
    sys.exit(main())
