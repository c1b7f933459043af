"""The formula of nova_sys/memory.py against what small runs hold: weights, gradients, optimizer state, and tensors kept for backward.

On a CPU, in fp32, and without the probabilities that its attention keeps (kernels on a GPU keep none); of the queries it keeps one copy
here, whatever the segments' lengths. What a GPU allocates besides is not seen.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from nova_kernels.testing import run_ranks
from nova_sys.memory import Device, memory_of

spec = importlib.util.spec_from_file_location(
    "layout_runs", Path(__file__).with_name("layout_runs.py")
)
assert spec is not None and spec.loader is not None
layout_runs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(layout_runs)

SIZES = {"data.pack_length": 512, "data.max_length": 256, "model.ffn_hidden_size": 176}
SIZES |= {"model.num_layers": 8, "model.vocab_size": 300, "train.steps": 1}
FULL, SELECTIVE = {"train.recompute": "full"}, {"train.recompute": "selective"}
HEADS = {"model.kv_shift": True, "model.qk_norm": True, "model.qkv_bias": True}
TP2 = {"parallel.tensor": 2}
CASES: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "none": {},
        "selective": SELECTIVE,
        "full": FULL,
        "bf16": {"train.precision": "bf16"},
        "plain optimizer, online reference": {
            "parallel.distributed_optimizer": False,
            "algo.reference": "online",
        },
        "shifted": {"model.kv_shift": True},
        "head norms": HEADS,
        "head norms, selective": {**HEADS, **SELECTIVE},
        "as many key heads": {"model.num_kv_heads": 4, "model.tied_embeddings": True},
    },
    2: {
        "DP2": {},
        "TP2, SP": {**TP2, "parallel.sequence": True},
        "TP2, SP, full": {**TP2, "parallel.sequence": True, **FULL},
        "CP2": {"parallel.context": 2},
        "CP2, selective": {"parallel.context": 2, **SELECTIVE},
        "PP2": {"parallel.pipeline": 2},
        "PP2, VPP2, full": {"parallel.pipeline": 2, "parallel.virtual_pipeline": 2, **FULL},
    },
}


class Kept:
    """Bytes of floating-point storages that the graph holds for the backward pass, each counted once; not the weights."""

    def __init__(self, weights: set[int], not_counted: int) -> None:
        self.weights, self.not_counted = weights, not_counted
        self.users: Counter[int] = Counter()
        self.bytes = self.most = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        place = tensor.untyped_storage().data_ptr()
        other = not tensor.is_floating_point() or tensor.shape[-1:] == (self.not_counted,)
        return tensor if place in self.weights or other else _Holder(self, tensor)

    @staticmethod
    def unpack(held: Any) -> torch.Tensor:
        return held.tensor if isinstance(held, _Holder) else held


class _Holder:
    def __init__(self, kept: Kept, tensor: torch.Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        self.place = tensor.untyped_storage().data_ptr()
        if kept.users[self.place] == 0:
            kept.bytes += tensor.untyped_storage().nbytes()
            kept.most = max(kept.most, kept.bytes)
        kept.users[self.place] += 1

    def __del__(self) -> None:
        self.kept.users[self.place] -= 1
        if self.kept.users[self.place] == 0:
            self.kept.bytes -= self.tensor.untyped_storage().nbytes()


def measure(rank: int, data: str, cases: list[tuple[str, dict[str, Any]]]) -> list[dict[str, int]]:
    """`run_ranks` worker: bytes that a rank holds in the first step of each case, by the parts of `Memory`."""
    from nova_sys import metrics
    from nova_sys.parallel import parallel_run
    from nova_sys.trainer import Trainer

    torch.set_num_threads(1)
    attention = importlib.import_module("nova_kernels.packed_attention.reference")
    found = []
    for out, settings in cases:
        config = layout_runs.small_recipe(Path(data), Path(out), settings)
        with (
            mock.patch.object(attention, "KEEP_BYTES", -1),
            mock.patch.object(
                attention, "_fold", lambda q, K, fold=attention._fold: fold(q, K).clone()
            ),
            mock.patch.object(metrics, "peak_flops", lambda *_: 1e12),
            parallel_run(config.parallel, seed=1) as parallel,
        ):
            trainer = Trainer(config, parallel)
            tokenizer = Path(data).with_name("tokenizer")  # of all the cases that follow
            if not tokenizer.exists():
                shutil.copytree(trainer.data.tokenizer_dir, tokenizer)
            weights = [p for chunk in trainer.chunks for p in chunk.parameters()]
            places = {p.untyped_storage().data_ptr() for p in weights}
            kept = Kept(places, not_counted=config.model.vocab_size // config.parallel.tensor)
            online = [] if trainer.online is None else trainer.online.chunks
            trainer.save = lambda *_, **__: None
            with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
                trainer.train()
            buffers = [buffer for chunk in trainer.ddp for buffer in chunk.buffers]
            held = {
                "weights": sum(p.nbytes for p in weights),
                "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
                "optimizer": optimizer_bytes(trainer.optimizer, places),
                "reference": sum(p.nbytes for chunk in online for p in chunk.parameters()),
                "activations": kept.most,
            }
            found.append(held)
            assert kept.bytes == 0
    return found


def optimizer_bytes(optimizer: Any, places: set[int]) -> int:
    """Moments, and main weights that are not the model's own."""
    total = 0
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                own = main.untyped_storage().data_ptr() in places
                state = part.optimizer.state[main]
                total += sum(state[name].nbytes for name in ("exp_avg", "exp_avg_sq"))
                total += 0 if own else main.nbytes
    return total


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "pairs.jsonl"
    pairs = (
        {"prompt": f"Q{i} {'ab ' * (i % 30)}", "chosen": f" A{i * i}", "rejected": " no"}
        for i in range(80)
    )
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture(scope="module")
def measured(data: Path) -> dict[str, list[dict[str, int]]]:
    """By case, what each rank holds."""
    found: dict[str, list[dict[str, int]]] = {}
    shared = {**SIZES, "data.cache_dir": str(data.with_name("cache"))}
    for ranks, some in CASES.items():
        cases = [(str(data.parent / name / "run"), {**shared, **s}) for name, s in some.items()]
        if ranks == 1:
            by_rank = [measure(0, str(data), cases)]
        else:
            by_rank = run_ranks(measure, ranks, str(data), cases, timeout_s=400)
        found |= {name: [rank[i] for rank in by_rank] for i, name in enumerate(some)}
    return found


@pytest.mark.parametrize(("ranks", "name"), [(n, name) for n in CASES for name in CASES[n]])
def test_the_formula_is_what_a_run_holds(
    measured: dict[str, list[dict[str, int]]], data: Path, ranks: int, name: str
) -> None:
    config = layout_runs.small_recipe(data, Path("run"), {**SIZES, **CASES[ranks][name]})
    device = Device(bytes=2 if name == "bf16" else 4, is_gpu=False)
    stages = config.parallel.pipeline
    for rank, held in enumerate(measured[name]):
        stage = rank * stages // ranks
        memory = vars(memory_of(config, config.model.vocab_size, ranks, stage, device))
        if name == "bf16":  # a CPU's norms keep fp32 copies there
            held.pop("activations")
        for part, num_bytes in held.items():
            assert memory[part] == pytest.approx(num_bytes, rel=0.03), (part, rank)
