"""Tables of an op beside its peers, for report.py."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from plots import machine

FLOOR = "three products alone"
PHASES = {"forward": "forward", "forward_backward": "forward and backward"}


def kernel_table(record: dict[str, Any]) -> str:
    """One table per case: time, times the fastest peer's, rate, memory."""
    versions = record["versions"]
    device = record.get("gpu") or f"{record['cpu']}, {record['threads']} threads"
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "liger-kernel") if versions.get(name))  # fmt: skip
    lines = [f"On an {device} ({named}), medians of calls in turns, by `{record['command']}`:"]
    for case, rows in groupby(record["results"], key=lambda row: row["case"]):
        lines += ["", f"**{case}**", "", *kernel_case(list(rows), record)]
    return "\n".join(lines)


def kernel_case(rows: list[dict[str, Any]], record: dict[str, Any]) -> list[str]:
    phases = [phase for phase in PHASES if any(phase in row for row in rows)]
    moves_only = not any(row.get(phase, {}).get("tflops") for phase in phases for row in rows)
    unit = "GB/s" if moves_only else "TFLOP/s" if "gpu" in record else "GFLOP/s"
    heads = ["provider"]
    for phase in phases:
        heads += [f"{PHASES[phase]}, ms", unit]
    heads += ["times the floor"] if any(row["provider"] == FLOOR for row in rows) else []
    heads += ["memory, MiB"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    floor = next((row for row in rows if row["provider"] == FLOOR), None)
    for row in rows:
        cells = [row["provider"]]
        for phase in phases:
            timed = row.get(phase)
            rate = timed and rate_of(timed, unit)
            cells += [f"{timed['ms']:.2f}", f"{rate:.0f}"] if timed else ["", ""]
        if floor is not None:
            timed, least = row.get(phases[-1]), floor[phases[-1]]["ms"]
            cells.append(f"{timed['ms'] / least:.2f}" if timed else "")
        peak = row.get("peak_mib")
        cells.append(row.get("error", "" if peak is None else f"{peak:.0f}"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def linear_dpo(record: dict[str, Any]) -> str:
    """One paragraph; the table stands in the op's README."""
    faster, leaner, over_floor = [], [], []
    for _, rows in groupby(record["results"], key=lambda row: row["case"]):
        by_name = {row["provider"]: row for row in rows}
        ours = by_name["reference, store"]
        peers = [row for name, row in by_name.items() if name.startswith("Liger's DPO")]
        ms = {id(row): row["forward_backward"]["ms"] for row in (*peers, ours, by_name[FLOOR])}
        faster.append(min(ms[id(peer)] for peer in peers) / ms[id(ours)])
        leaner.append(min(peer["peak_mib"] for peer in peers) / ours["peak_mib"])
        over_floor.append(ms[id(ours)] / ms[id(by_name[FLOOR])])
    return (
        f"**The preference loss from hidden states** (`linear_dpo_loss`, {machine(record)}): {min(faster):.0f} to {max(faster):.0f} times as fast as Liger's fused DPO "
        f"loss on pairs of hh-rlhf's lengths, with {min(leaner):.1f} to {max(leaner):.1f} times less memory, and {min(over_floor):.2f} to {max(over_floor):.2f} times the "
        "time of the three matrix products that it cannot do without ([table](kernels/nova_kernels/linear_dpo_loss/README.md))."
    )


def rate_of(timed: dict[str, Any], unit: str) -> float:
    if unit == "GB/s":
        return timed["gb_per_s"]
    return timed["tflops"] if unit == "TFLOP/s" else 1e3 * timed["tflops"]
