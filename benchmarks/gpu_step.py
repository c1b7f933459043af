"""DPO steps at the shapes of Llama 3 8B's layers: `python benchmarks/gpu_step.py --data hh --out FILE.json`.

The trainer is the product's, on random weights and pairs of random tokens (gpu_workload.py), with as many layers as fit. One process runs all
variants of one precision on the same model: each op in another backend, nothing shared, keys and values shifted. Each gets the same packs.
FILE.json is written again after every variant; one that fails has its error.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_profile import kernel_seconds, kernels_of, slowest_kernels
from gpu_workload import (
    DATA,
    LLAMA_8B_LAYERS,
    TINY,
    TINY_DATA,
    layers_that_fit,
    quick_weights,
    recipe,
    write_pairs,
)
from step_ours import hand_over
from timing import ceilings
from torch.profiler import ProfilerActivity, profile

from nova_kernels.backend import cuda_runs_on, triton_runs_on
from nova_sys.data.loader import PackLoader
from nova_sys.model.attention import PackedCoreAttention
from nova_sys.model.build import attention_tile_sizes
from nova_sys.model.output_layer import LogprobOutputLayer
from nova_sys.parallel import parallel_run
from nova_sys.trainer import Trainer

OPS: tuple[str, ...] = ("packed_attention", "linear_logprob", "kv_shift_rope")
PEAK_BF16_TFLOPS = 989.0
"""Dense, of an H100 SXM or H200."""
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Variant:
    name: str
    backends: dict[str, str] = field(default_factory=dict)
    """By op."""
    share_prefix: bool = True
    kv_shift: bool = False
    profiled: bool = False


def runnable(device: torch.device) -> list[str]:
    triton = device.type == "cuda" and triton_runs_on(device)  # not its interpreter
    here = {"triton": triton, "cuda": cuda_runs_on(device), "reference": True}
    return [kind for kind, runs in here.items() if runs]


def variants(base_kind: str, wanted: str, kinds: dict[str, list[str]]) -> Iterator[Variant]:
    """one: all ops in one backend. few: and the two that concern the packs. all: and each op in every other backend, one at a time.

    kinds: backends by op; what all have in common is also measured together.
    """
    base = Variant(f"all in {base_kind}", dict.fromkeys(OPS, base_kind), profiled=True)
    yield base
    if wanted == "one":
        return
    if wanted == "all":
        for op in OPS:
            for kind in (kind for kind in kinds[op] if kind != base_kind):
                changed = {**base.backends, op: kind}
                yield replace(base, name=f"{op} in {kind}", backends=changed, profiled=False)
    yield replace(base, name="nothing shared", share_prefix=False, profiled=False)
    yield replace(base, name="keys and values shifted", kv_shift=True, profiled=False)
    if wanted == "all":
        for kind in (kind for kind in kinds[OPS[0]] if kind != base_kind):
            if all(kind in of_op for of_op in kinds.values()):
                all_of = dict.fromkeys(OPS, kind)
                yield Variant(f"all in {kind}", all_of, profiled=kind == "reference")


@contextmanager
def as_variant(trainer: Trainer, variant: Variant) -> Iterator[None]:
    """The trainer's model and packs as the variant wants them. The mixes of keys and values begin as the identity."""
    kernels = variant.backends["packed_attention"]
    old_loader, old_mixes = trainer.loader, {}
    for module in (m for chunk in trainer.chunks for m in chunk.modules()):
        if isinstance(module, PackedCoreAttention):
            module.attention_backend = kernels
            module.rope_backend = variant.backends["kv_shift_rope"]
            old_mixes[module] = (module.k_mix_K2, module.v_mix_K2)
            if not variant.kv_shift:
                module.k_mix_K2 = module.v_mix_K2 = None
        elif isinstance(module, LogprobOutputLayer):
            module.backend = variant.backends["linear_logprob"]
    data, train = trainer.config.data, trainer.config.train
    trainer.loader = PackLoader(
        trainer.data.store,
        pack_length=data.pack_length,
        global_batch_packs=train.global_batch_packs,
        data_rank=0,
        data_size=1,
        seed=train.seed,
        share_prefix=variant.share_prefix,
        ref_logp=old_loader._ref_logp,
        tile_sizes=attention_tile_sizes(trainer.config.model, trainer.parallel, kernels),
    )
    trainer.loader.start(0)
    try:
        yield
    finally:
        trainer.loader.stop()
        trainer.loader = old_loader
        for module, (k_mix, v_mix) in old_mixes.items():
            module.k_mix_K2, module.v_mix_K2 = k_mix, v_mix


class Steps:
    """Counts steps over all variants, and keeps the records that the trainer would write."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.done = trainer, 0
        self.records: list[dict[str, Any]] = []
        trainer.telemetry.step = lambda record, histograms=None: self.records.append(dict(record))

    def run(self, count: int, seconds: float = 0.0) -> list[dict[str, Any]]:
        """At least `count` steps, and more until the seconds are over."""
        self.records = []
        began_s = time.perf_counter()
        while len(self.records) < count or time.perf_counter() - began_s < seconds:
            self.trainer._one_step(self.done)
            self.done += 1
        return self.records


def measure(
    steps: Steps, variant: Variant, seconds: float, trace: Path | None, row: dict[str, Any]
) -> None:
    """Into `row`, which keeps what was measured before an error."""
    on_gpu = torch.cuda.is_available()
    began_s = time.perf_counter()
    first = steps.run(WARM_UP_STEPS)[0]
    warm_up_s = time.perf_counter() - began_s
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    records = steps.run(3, seconds)
    row |= {"warm_up_s": warm_up_s, "first_loss": first["loss"]}
    row |= speeds(records, steps.trainer.clock.peak_flops)
    row["peak_gib"] = max(record["peak_gib"] for record in records)
    if variant.profiled:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            (record,) = steps.run(1)
        kernels = kernels_of(profiler.events() or ())
        row["profiled_step_s"] = record["step_time_s"]
        row["kernel_seconds_of_a_step"] = kernel_seconds(kernels)
        row["slowest_kernels"] = slowest_kernels(kernels)
        if trace is not None:
            profiler.export_chrome_trace(str(trace))


def speeds(records: Sequence[dict[str, Any]], peak_flops: float) -> dict[str, Any]:
    """Over all steps together, because packs differ; and the times of the single steps."""
    times = [record["step_time_s"] for record in records]

    def rate(name: str) -> float:
        return sum(r[name] * r["step_time_s"] for r in records) / sum(times)

    return {
        "tokens_per_s": rate("tokens_per_s"),
        "pairs_per_s": rate("pairs_per_s"),
        "tflops": rate("mfu") * peak_flops / 1e12,
        "fill": rate("fill"),
        "step_time_s": {"median": statistics.median(times), "all": times},
    }


def shares_of_peak(rows: list[dict[str, Any]], gemm_tflops: float, device: torch.device) -> None:
    """MFU against the data sheet and against the product measured in this process; how each compares with the first variant."""
    for row in (row for row in rows if "tflops" in row):
        row["mfu_of_measured_gemm"] = row["tflops"] / gemm_tflops
        if device.type == "cuda":
            row["mfu"] = row["tflops"] / PEAK_BF16_TFLOPS
        if "pairs_per_s" in rows[0]:
            row["pairs_per_s_of_the_first"] = row["pairs_per_s"] / rows[0]["pairs_per_s"]


def product_tflops(ceilings: dict[str, float]) -> float:
    return next(rate for name, rate in ceilings.items() if name.endswith("_tflops"))


def chosen_settings(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Of the recipe; with how the number of layers was found."""
    settings = dict(TINY if arguments.tiny else LLAMA_8B_LAYERS)
    found: dict[str, Any] = {}
    if not arguments.tiny and device.type == "cuda":
        found = layers_that_fit(torch.cuda.mem_get_info()[0], settings)
        settings["model.num_layers"] = found["layers"]
    if arguments.layers:
        settings["model.num_layers"] = arguments.layers
    settings |= {"model.kv_shift": True, "train.kernels": arguments.base}  # variants change both
    settings |= {
        "train.check_first_loss": False
    }  # the losses are in the record, and no number is lost
    if arguments.precision == "fp8":
        settings |= {"train.precision": "fp8", "fp8.recipe": arguments.recipe}
    return {"settings": settings, "layers": found}


def measure_all(
    trainer: Trainer, record: dict[str, Any], arguments: argparse.Namespace, device: torch.device
) -> None:
    steps = Steps(trainer)
    here = runnable(device)
    kinds = {op: [k for k in here if k in getattr(arguments, op).split(",")] for op in OPS}
    for variant in variants(arguments.base, arguments.variants, kinds):
        row: dict[str, Any] = {k: v for k, v in asdict(variant).items() if k != "profiled"}
        trace = arguments.trace if not record["results"] else None
        gc.collect()
        torch.cuda.empty_cache()  # an earlier one may have run out of memory
        try:
            with as_variant(trainer, variant):
                measure(steps, variant, arguments.seconds, trace, row)
        except Exception as error:  # one op's fault must not cost the others' numbers
            row["error"] = f"{type(error).__name__}: {str(error)[:500]}"
        record["results"].append(row)
        shares_of_peak(record["results"], product_tflops(record["ceilings"]), device)
        for path in filter(None, (arguments.out, arguments.copy)):
            save(record, path)
        print(row["name"], row.get("error") or f"{row['pairs_per_s']:.1f} pairs/s", flush=True)


def save(record: dict[str, Any], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.rename(path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", choices=DATA, default="hh")
    parser.add_argument("--precision", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--recipe", default="tensorwise", help="of FP8")
    parser.add_argument("--base", choices=["triton", "cuda", "reference"], default="reference")
    parser.add_argument("--variants", choices=["all", "few", "one"], default="all")
    for op in OPS:
        parser.add_argument(f"--{op}", default="triton,cuda,reference", help="its backends")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a variant, timed")
    parser.add_argument("--layers", type=int, help="else as many as fit")
    parser.add_argument("--trace", type=Path, help="of a step of the first variant")
    parser.add_argument("--hand-over", type=Path, help="folder for gpu_trl.py")
    parser.add_argument("--copy", type=Path, help="a second place for the JSON, for gpu_trl.py")
    parser.add_argument("--tiny", action="store_true", help="to test the code; also on a CPU")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    if arguments.precision == "fp8" and find_spec("transformer_engine") is None:
        save(
            {"skipped": "Transformer Engine is not installed; docs/gpu.md says how"}, arguments.out
        )
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record: dict[str, Any] = {"data": arguments.data, "precision": arguments.precision}
    record |= chosen_settings(arguments, device)
    record["ceilings"] = ceilings(device, tiny=arguments.tiny)
    record["results"] = []
    lengths = (TINY_DATA if arguments.tiny else DATA)[arguments.data]
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_pairs(work, lengths, record["settings"]["model.vocab_size"])
        config = recipe(work, record["settings"])
        began_s = time.perf_counter()
        parallel = stack.enter_context(parallel_run(config.parallel, seed=config.train.seed))
        quick = mock.patch("nova_sys.model.build.initialize_weights", quick_weights)
        stack.enter_context(quick)
        trainer = Trainer(config, parallel)
        record["parameters"] = sum(p.numel() for c in trainer.chunks for p in c.parameters())
        record["setup_s"] = time.perf_counter() - began_s
        if arguments.hand_over:
            hand_over(trainer, arguments.hand_over)
        measure_all(trainer, record, arguments, device)
    return int("error" in record["results"][0])


if __name__ == "__main__":
    sys.exit(main())
