"""What gpu_check.py found on a GPU, for report.py: training steps, and which part ended how."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]


def device_line(device: Record) -> str:
    gpu, packages = device["gpu"], device["packages"]
    wanted = ("torch", "triton", "megatron-core", "transformer-engine")
    named = ", ".join(f"{name} {packages[name]}" for name in wanted if packages.get(name))
    return f"{gpu['name']}, driver {gpu['driver_version']}, CUDA {gpu['cuda']}, {named}"


def gpu_step(record: Record) -> str:
    """Steps by precision and data, the ablation, and the same step in TRL."""
    first = record["steps"]["step bf16"]
    settings, peaks = first["settings"], record["device"]["gpu"]["ceilings"]
    lines = [
        f"**A DPO step at Llama 3 8B's layer shapes** ({device_line(record['device'])}): {settings['model.num_layers']} layers with their optimizer state, "
        f"{first['parameters'] / 1e9:.2f} billion parameters, {settings['train.global_batch_packs']} packs of {settings['data.pack_length']:,} tokens a step. "
        f"FLOPs are those that the packs needed; MFU of 989 dense bf16 TFLOP/s, and of a product measured beside it ({peaks['bf16_tflops']:.0f}).",
        "",
        "| step | pairs/s | tokens/s | TFLOP/s | MFU | of the product | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, part in record["steps"].items():
        lines.append(step_row(name.removeprefix("step "), part["results"][0]))
    lines += ["", "| the first, with one thing changed | pairs/s | of the first |", "|---|---|---|"]
    for row in first["results"][1:]:
        changed = row.get("pairs_per_s")
        cells = [f"{changed:.1f}", f"{row['pairs_per_s_of_the_first']:.2f}"] if changed else [row["error"].partition(":")[0], ""]  # fmt: skip
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join([*lines, *trl_lines(record)])


def step_row(name: str, row: Record) -> str:
    if "pairs_per_s" not in row:
        return f"| {name} | {row['error'].partition(':')[0]} | | | | | |"
    cells = [f"{row['pairs_per_s']:.1f}", f"{row['tokens_per_s']:,.0f}", f"{row['tflops']:.0f}"]
    cells += [f"{row['mfu']:.1%}", f"{row['mfu_of_measured_gemm']:.1%}", f"{row['peak_gib']:.1f}"]
    return f"| {name}, {row['name']} | {' | '.join(cells)} |"


def trl_lines(record: Record) -> Iterator[str]:
    trl = record.get("trl")
    if not trl:
        yield from ("", "The same step in TRL: not measured.")
        return
    best, versions = trl["best"], trl["versions"]
    liger = f" with Liger {versions['liger-kernel']}" if trl["liger"] else ""
    ratio = f": ours is **{trl['ours_times_trl']:.1f} times** as fast" if "ours_times_trl" in trl else ""  # fmt: skip
    yield ""
    yield (
        f"The same weights, pairs and GPU in TRL {versions['trl']}{liger}, {best['pairs_per_step']} pairs a step (the fastest size that fits), "
        f"{best['positions_per_pair']:.0f} positions a pair: {best['pairs_per_s']:.1f} pairs/s{ratio}."
    )


def gpu_check(record: Record) -> str:
    gpu = record["device"]["gpu"]
    peaks = gpu["ceilings"]
    fp8 = f", {peaks['fp8_tflops']:.0f} TFLOP/s in FP8" if "fp8_tflops" in peaks else ""
    lines = [
        f"**`make gpu-check`** ({device_line(record['device'])}, {gpu['power.limit']} limit, {gpu['after_ceilings']['clocks.sm']} under load). Measured ceilings: "
        f"copy {peaks['copy_gb_per_s']:,.0f} GB/s, product of 8192 x 8192 matrices {peaks['bf16_tflops']:.0f} TFLOP/s in bf16{fp8}.",
        "",
        "| part | ended | seconds |",
        "|---|---|---|",
    ]
    for name, part in record["parts"].items():
        counts = (part.get("result") or {}).get("counts", {})
        told = "; ".join(f"{number} {outcome}" for outcome, number in counts.items())
        lines.append(f"| {name} | {part['status']}{f' ({told})' if told else ''} | {part.get('seconds', '')} |")  # fmt: skip
    return "\n".join(lines)


def fp8_gate(record: Record) -> str:
    """How far each recipe's loss curve is from bf16's, and how far it may be."""
    seeds = len(record["baseline"]["losses"])
    lines = [
        f"**FP8 beside {record['baseline']['name']}** (`benchmarks/fp8_gate.py`): losses of {record['steps']} DPO steps from one SFT checkpoint, the mean of {seeds} "
        f"seeds over windows of {record['window']} steps, may differ by {record['half_width']:.4f} (twice what seeds differ by):",
        "",
        "| recipe | largest difference | windows outside | passed |",
        "|---|---|---|---|",
    ]
    for name, found in record["candidates"].items():
        passed = "yes" if found["passed"] else "no"
        lines.append(
            f"| {name} | {found['largest_difference']:.4f} | {len(found['windows_outside'])} | {passed} |"
        )
    return "\n".join(lines)
