"""Draws benchmarks/results/*.json into docs/images: time beside peers, rooflines, where a step's time goes. report.py calls it.

A picture's bytes depend on matplotlib's version, so `--check` compares what it was drawn from: the hash of its JSON files, kept in the PNG.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
KEY = "Results"
"""Of the hash among a PNG's texts."""
INK, GRID, OURS, OURS_TOO, PEER, FLOOR = "#24292f", "#e3e6e8", "#0b7a75", "#7cc4bf", "#b4bcc4", "#e0a458"  # fmt: skip
CATEGORIES = ("#0b7a75", "#3d9a94", "#7cc4bf", "#e0a458", "#c8553d", "#8f2d56", "#6c7a89", "#9aa5b1", "#c3cad1", "#dfe3e7")  # fmt: skip
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
NAMES = {"torch.compile of that": "torch.compile of whole logits", "torch, whole logits of the rows": "torch, whole logits"}  # fmt: skip
FLOOR_NAME = "three products alone"
OURS_NAMES = ("reference", "triton", "cuda")
OPS = ("linear_dpo", "packed_attention", "kv_shift_rope")
TITLES = {"linear_dpo": "DPO loss from hidden states", "packed_attention": "attention over packs", "kv_shift_rope": "KV shift and rotary positions"}  # fmt: skip
Record = dict[str, Any]


def machine(record: Record) -> str:
    return f"{record['cpu']}, {record['cores']} cores"


def is_ours(provider: str) -> bool:
    return provider.partition(",")[0] in OURS_NAMES


def color_of(provider: str, best: str) -> str:
    if provider == best:
        return OURS
    return OURS_TOO if is_ours(provider) else FLOOR if provider == FLOOR_NAME else PEER


def plain(axes: Axes, grid: str = "x") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=INK, length=0, labelsize=9)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)  # pyright: ignore[reportArgumentType]
    axes.set_axisbelow(True)


def new_figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def milliseconds(row: Record) -> float | None:
    timed = row.get("forward_backward") or row.get("forward")
    return timed["ms"] if timed else None


def timed_cases(record: Record) -> Iterator[tuple[str, dict[str, float]]]:
    """Case -> milliseconds by provider, of those that were timed."""
    for case, rows in groupby(record["results"], key=lambda row: row["case"]):
        times = {row["provider"]: ms for row in rows if (ms := milliseconds(row)) is not None}
        kernels = {name for name in times if name.startswith(("triton", "cuda"))}
        if kernels:  # the reference is then what they are checked with, and no contender
            times = {n: ms for n, ms in times.items() if not n.startswith("reference")}
        if any(map(is_ours, times)):
            yield case, times


def draw_peers(records: Sequence[Record]) -> Figure:
    """A panel per op: bars by case, each provider's time over that of our fastest."""
    panels = [(r["op"], list(timed_cases(r))[:3]) for r in records]
    counts = [sum(len(times) + 1.2 for _, times in cases) for _, cases in panels]
    figure = new_figure(10.5, 0.9 + 0.235 * sum(counts))
    grid = figure.subplots(len(panels), 1, height_ratios=counts, squeeze=False)
    for axes, (op, cases) in zip(grid[:, 0], panels, strict=True):
        peer_bars(axes, op, cases)
    grid[-1, 0].set_xlabel("time of forward and backward, ours = 1 (shorter is faster)", color=INK)
    return figure


def peer_bars(axes: Axes, op: str, cases: list[tuple[str, dict[str, float]]]) -> None:
    at, ticks, names = 0.0, [], []
    largest = 1.0
    for case, times in cases:
        best = min((name for name in times if is_ours(name)), key=times.__getitem__)
        axes.text(0, at, case, fontsize=9, color=INK, va="center", fontweight="bold", bbox=BOX)
        for name, ms in sorted(times.items(), key=lambda item: item[1]):
            at += 1
            ratio = ms / times[best]
            largest = max(largest, ratio)
            axes.barh(at, ratio, height=0.72, color=color_of(name, best))
            says = f"{ms:.3g} ms" if name == best else f"{ratio:.2f}×" if ratio < 3 else f"{ratio:.1f}×"  # fmt: skip
            axes.text(ratio, at, f" {says}", fontsize=8.5, color=INK, va="center", bbox=BOX)
            ticks.append(at)
            names.append(f"ours: {name}" if is_ours(name) else NAMES.get(name, name))
        at += 1.2
    axes.set_yticks(ticks, names)
    axes.set_ylim(at - 0.4, -0.8)
    axes.set_xlim(0, largest * 1.08)
    axes.axvline(1, color=OURS, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_title(TITLES[op], loc="left", fontsize=11, color=INK)
    plain(axes)


def product_ceiling(record: Record) -> float | None:
    """TFLOP/s of a large product. None for records that have a small one's, which is no ceiling."""
    ceilings = record["ceilings"]
    return ceilings.get("bf16_tflops") if record["hardware"] != "cpu" else ceilings.get("fp32_tflops")  # fmt: skip


def draw_roofline(records: Sequence[Record]) -> Figure:
    """Left: useful FLOP/s over FLOPs per byte that must be moved, under the measured ceilings. Right: bytes per second of what has no FLOPs to speak of."""
    figure = new_figure(10.5, 4.6)
    axes, bandwidth = figure.subplots(1, 2, width_ratios=[2.1, 1])
    peak, copy = product_ceiling(records[0]), records[0]["ceilings"]["copy_gb_per_s"]
    assert peak is not None
    knee = 1e3 * peak / copy
    axes.plot([knee / 12, knee, knee * 60], [peak / 12, peak, peak], color=INK, linewidth=1.4)
    style: dict[str, Any] = {"fontsize": 8.5, "color": INK, "va": "bottom"}
    axes.text(knee * 55, peak * 1.03, f"product of square matrices: {peak:.3g} TFLOP/s", ha="right", **style)  # fmt: skip
    along: dict[str, Any] = {"rotation_mode": "anchor", "transform_rotates_text": True}  # fmt: skip
    along["rotation"] = math.degrees(math.atan2(peak, knee))  # along the line, in data units
    axes.text(knee / 7, peak / 7 * 1.06, f"copy: {copy:,.0f} GB/s", **style, **along)
    for record, color in zip(records, (OURS, "#c8553d", "#e0a458"), strict=False):
        points = list(roofline_points(record))
        for ours in (True, False):
            chosen = [(x, y) for mine, x, y in points if mine == ours]
            if chosen:
                label = f"{TITLES[record['op']]}, {'ours' if ours else 'fastest peer'}"
                axes.scatter(*zip(*chosen, strict=True), s=44 if ours else 30, marker="o" if ours else "x", color=color, label=label, zorder=3)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="useful FLOPs per byte that must be moved", ylabel="useful TFLOP/s")  # fmt: skip
    ticks = [t for t in (m * 10.0**e for e in range(-4, 5) for m in (1, 2, 5)) if peak / 14 < t < peak]  # fmt: skip
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    plain(axes, "both")
    copy_bars(bandwidth, records, copy)
    return figure


def roofline_points(record: Record) -> Iterator[tuple[bool, float, float]]:
    """Per case ours that is fastest, and the fastest peer: (ours, FLOPs per byte, TFLOP/s)."""
    for _, group in groupby(record["results"], key=lambda row: row["case"]):
        rows = [r for r in group if milliseconds(r) and r["provider"] != FLOOR_NAME]
        for ours in (True, False):
            chosen = [row for row in rows if is_ours(row["provider"]) == ours]
            if chosen:
                fastest = min(chosen, key=lambda row: milliseconds(row) or 0.0)
                timed = fastest.get("forward_backward") or fastest["forward"]
                if timed["tflops"] > 0:
                    yield ours, 1e3 * timed["tflops"] / timed["gb_per_s"], timed["tflops"]


def copy_bars(axes: Axes, records: Sequence[Record], copy: float) -> None:
    bars = [
        (row["provider"], row["forward_backward"]["gb_per_s"])
        for record in records
        if record["op"] == "kv_shift_rope"
        for row in record["results"]
        if row["case"] == record["results"][0]["case"] and "forward_backward" in row
    ]
    bars.sort(key=lambda bar: -bar[1])
    best = next((name for name, _ in bars if is_ours(name)), "")
    for at, (name, rate) in enumerate(bars):
        axes.barh(at, rate, height=0.7, color=color_of(name, best))
        axes.text(rate, at, f" {rate:,.0f}", va="center", fontsize=8.5, color=INK, bbox=BOX, zorder=4)  # fmt: skip
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.axvline(copy, color=INK, linewidth=1.2)
    axes.set_xlim(0, copy * 1.25)
    axes.set_title(f"{TITLES['kv_shift_rope']}, GB/s\n(line: copy)", loc="left", fontsize=10, color=INK)  # fmt: skip
    plain(axes)


def stacked(axes: Axes, rows: list[tuple[str, dict[str, float]]], unit: str) -> None:
    """Horizontal bars of parts, largest part of the first row first; small parts are unnamed but in the legend."""
    names = sorted({n for _, parts in rows for n in parts}, key=lambda n: -rows[0][1].get(n, 0.0))
    colors = {name: CATEGORIES[min(i, len(CATEGORIES) - 1)] for i, name in enumerate(names)}
    for at, (_, parts) in enumerate(rows):
        start, total = 0.0, sum(parts.values())
        for name in names:
            width = parts.get(name, 0.0)
            axes.barh(at, width, left=start, height=0.6, color=colors[name], label=name if at == 0 else None)  # fmt: skip
            if width > 0.045 * total:
                axes.text(start + width / 2, at, f"{width / total:.0%}", ha="center", va="center", fontsize=8.5, color="white")  # fmt: skip
            start += width
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(unit, color=INK)
    axes.legend(frameon=False, fontsize=8.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.28))  # fmt: skip
    plain(axes)


def speed_bars(axes: Axes, bars: list[tuple[str, float, str]], title: str) -> None:
    """bars: name, pairs per second, color."""
    for at, (_, rate, color) in enumerate(bars):
        axes.barh(at, rate, height=0.66, color=color)
        axes.text(rate, at, f" {rate:.3g}", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(rate for _, rate, _ in bars))
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    plain(axes)


CPU_BARS = {  # provider of step_cpu.json -> name
    "full": "ours",
    "one_pack": "a step after every pack",
    "all_rows": "all tokens through the output layer",
    "in_order": "8 pairs a step, as TRL",
    "unshared": "nothing shared",
    "padded": "padded, not packed",
    "plain": "padded, all tokens, nothing shared",
    "trl": "TRL",
}


def draw_cpu_step(records: Sequence[Record]) -> Figure:
    (record,) = records
    figure = new_figure(10.5, 5.6)
    speed, parts = figure.subplots(2, 1, height_ratios=[2.6, 1])
    rates = {name: p["pairs_per_s"] for name, p in record["providers"].items()}
    colors = {"full": OURS, "trl": "#c8553d"}
    bars = [(n, rates[k], colors.get(k, OURS_TOO)) for k, n in CPU_BARS.items() if k in rates]
    bars.sort(key=lambda bar: -bar[1])
    speed_bars(speed, bars, f"DPO on a CPU ({machine(record)}), pairs per second")  # fmt: skip
    profile = record["profile"]["seconds_per_step"]
    parts.set_title("where our step's time goes", loc="left", fontsize=11, color=INK)
    stacked(parts, [("ours", profile)], "seconds of a step")
    return figure


def draw_gpu_step(records: Sequence[Record]) -> Figure:
    (record,) = records
    rows = record["steps"]["step bf16"]["results"]
    trl = record.get("trl", {}).get("best")
    bars = [(row["name"], row["pairs_per_s"], OURS if i == 0 else OURS_TOO) for i, row in enumerate(rows) if "pairs_per_s" in row]  # fmt: skip
    for name, part in record["steps"].items():
        if "fp8" in name and "long" not in name and "pairs_per_s" in part["results"][0]:
            bars.append((name.removeprefix("step "), part["results"][0]["pairs_per_s"], OURS))
    bars += [("TRL with Liger", trl["pairs_per_s"], "#c8553d")] if trl else []
    profiled = [(row["name"], row["kernel_seconds_of_a_step"]) for row in rows if row.get("kernel_seconds_of_a_step")]  # fmt: skip
    figure = new_figure(10.5, 2.4 + 0.28 * len(bars) + 0.6 * len(profiled))
    if not profiled:
        speed_bars(figure.subplots(), bars, "DPO step, pairs per second")
        return figure
    speed, parts = figure.subplots(2, 1, height_ratios=[len(bars), 1.6 * len(profiled)])
    speed_bars(speed, bars, "DPO step, pairs per second")
    parts.set_title("where a step's time on the GPU goes", loc="left", fontsize=11, color=INK)
    stacked(parts, profiled, "seconds of kernels in a step")
    return figure


@dataclass(frozen=True)
class Plot:
    inputs: tuple[str, ...]
    """Names of results; those that are missing are left out."""
    draw: Callable[[Sequence[Record]], Any]
    alt: str


def plots(hardware: str) -> dict[str, Plot]:
    """File name -> plot."""
    ops = tuple(f"{op}_{hardware}" for op in OPS)
    peers = "Time of each op beside its peers'"
    roofline = "Useful FLOP/s and bytes per second under the measured ceilings"
    return {
        f"peers_{hardware}.png": Plot(ops, draw_peers, peers),
        f"roofline_{hardware}.png": Plot(ops, draw_roofline, roofline),
    }


CPU_STEP = Plot(("step_cpu",), draw_cpu_step, "Pairs per second on a CPU, and where a step's time goes")  # fmt: skip
GPU_STEP = "Pairs per second of a DPO step at Llama 3 8B's shapes, and where its time goes"


def all_plots(results: Path) -> dict[str, Plot]:
    """Every plot whose results are there. A roofline needs real ceilings."""
    found = {"step_cpu.png": CPU_STEP}
    for hardware in ("cpu", "h100", "h200"):
        found |= plots(hardware)
        found[f"step_{hardware}.png"] = found.get(f"step_{hardware}.png", Plot((f"gpu_step_{hardware}",), draw_gpu_step, GPU_STEP))  # fmt: skip
    there: dict[str, Plot] = {}
    for name, plot in found.items():
        inputs = tuple(i for i in plot.inputs if (results / f"{i}.json").exists())
        if name.startswith("roofline"):
            inputs = tuple(i for i in inputs if product_ceiling(read(results, i)) is not None)
        if inputs:
            there[name] = Plot(inputs, plot.draw, plot.alt)
    return there


def read(results: Path, name: str) -> Record:
    return json.loads((results / f"{name}.json").read_text())


def hash_of(plot: Plot, results: Path) -> str:
    digest = hashlib.sha256()
    for name in plot.inputs:
        digest.update((results / f"{name}.json").read_bytes())
    return digest.hexdigest()


def drawn_from(path: Path) -> str | None:
    """The hash in a PNG's texts; None where there is no such file."""
    if not path.exists():
        return None
    content, at = path.read_bytes(), 8
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        text = content[at + 8 : at + 8 + length]
        if kind == b"tEXt" and text.startswith(KEY.encode() + b"\0"):
            return text.partition(b"\0")[2].decode()
        at += 12 + length
    return None


def stale(results: Path, images: Path = IMAGES) -> list[str]:
    """Pictures that were not drawn from what is in `results`."""
    return [n for n, plot in all_plots(results).items() if drawn_from(images / n) != hash_of(plot, results)]  # fmt: skip


def draw_all(results: Path, images: Path = IMAGES) -> None:
    """Draws those that are stale."""
    for name in stale(results, images):
        plot = all_plots(results)[name]
        save(plot.draw([read(results, i) for i in plot.inputs]), images / name, hash_of(plot, results))  # fmt: skip


def save(figure: Figure, path: Path, made_of: str) -> None:
    """With 64 colors, which halves the file."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    drawn, texts = io.BytesIO(), PngInfo()
    figure.savefig(drawn, dpi=110)
    texts.add_text(KEY, made_of)
    image = Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    image.save(path, optimize=True, pnginfo=texts)
