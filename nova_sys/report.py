"""The demo's report: a table on the terminal and one picture. Both show the same dictionary that report.json holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SFT_COLOR, DPO_COLOR, REJECTED_COLOR = "#7a8794", "#1f6fb4", "#c8553d"
SMOOTHING_SHARE = 0.04  # window of the running mean, as a share of the run's steps

Metrics = dict[str, list[float]]


def read_metrics(run_dir: Path) -> Metrics:
    """Columns of a run's metrics.jsonl that every line has."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    common = [key for key in records[0] if all(record.get(key) is not None for record in records)]
    return {key: [record[key] for record in records] for key in common}


def print_report(report: dict[str, Any], out: Path) -> None:
    """The results, the samples, and where everything lies."""
    console = Console()
    console.print(_results_table(report))
    console.print(_samples_table(report["samples"]))
    stages = ", ".join(f"{stage} {value:.0f} s" for stage, value in report["seconds"].items())
    console.print(f"{report['seconds_total'] / 60:.1f} minutes: {stages}")
    console.print(
        f"picture {out / 'report.png'}, numbers {out / 'report.json'}, model {out / 'dpo'}; "
        f"curves: tensorboard --logdir {out}",
        highlight=False,
        soft_wrap=True,
    )


def _results_table(report: dict[str, Any]) -> Table:
    sft, dpo = report["sft"], report["dpo"]
    table = Table(title=f"{report['num_eval']} held-out prompts, greedy answers, exact match")
    table.add_column("")
    for heading in ("after SFT", "after DPO", "points"):
        table.add_column(heading, justify="right")

    def row(name: str, before: float | None, after: float, style: str = "") -> None:
        shown = ["" if before is None else f"{before:.1%}", f"{after:.1%}"]
        points = "" if before is None else f"{100 * (after - before):+.1f}"
        table.add_row(name, *shown, points, style=style)

    for task in sft["by_task"]:
        row(task, sft["by_task"][task], dpo["by_task"][task])
    row("all tasks", sft["accuracy"], dpo["accuracy"], style="bold")
    table.add_section()
    row("prompts that tempt to the bad habit", sft["tempting"], dpo["tempting"])
    row("other prompts", sft["not_tempting"], dpo["not_tempting"])
    row("answers that show the bad habit", sft["habitual"], dpo["habitual"])
    table.add_section()
    row("right answer likelier than the wrong one", sft["prefers_chosen"], dpo["prefers_chosen"])
    row("reward accuracy against the SFT model", None, dpo["reward_accuracy"])
    return table


def _samples_table(samples: Sequence[dict[str, str]]) -> Table:
    table = Table(title="samples (the first prompts of each task that tempt to the bad habit)")
    for heading in ("prompt", "after SFT", "after DPO"):
        table.add_column(heading)
    for sample in samples:
        marked = [
            f"[{'green' if sample[name] == sample['right'] else 'red'}]{escape(sample[name])}"
            for name in ("sft", "dpo")
        ]
        table.add_row(escape(sample["prompt"]), *marked)
    return table


def draw_report(path: Path, report: dict[str, Any], sft: Metrics, dpo: Metrics) -> None:
    """Four panels: SFT loss, DPO margin and rewards, DPO loss and reward accuracy, accuracy before and after by task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7.2), layout="constrained")
    (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
    _draw_sft(top_left, sft)
    _draw_rewards(top_right, dpo)
    _draw_dpo_loss(bottom_left, dpo)
    _draw_accuracy(bottom_right, report)
    for axes in (top_left, top_right, bottom_left, bottom_right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e3e6e8", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.suptitle(
        f"A small model aligned from nothing on a CPU in {report['seconds_total'] / 60:.1f} minutes: "
        f"exact match {report['sft']['accuracy']:.0%} → {report['dpo']['accuracy']:.0%}",
        fontsize=13,
        fontweight="bold",
    )
    figure.savefig(path, dpi=130)


def _draw_sft(axes: Axes, sft: Metrics) -> None:
    _draw_curve(axes, sft, "loss", SFT_COLOR, "loss")
    axes.set_ylim(bottom=0)
    axes.set(title="SFT on imperfect answers", xlabel="step", ylabel="nats per token")


def _draw_rewards(axes: Axes, dpo: Metrics) -> None:
    _draw_curve(axes, dpo, "chosen_reward", DPO_COLOR, "chosen")
    _draw_curve(axes, dpo, "rejected_reward", REJECTED_COLOR, "rejected")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(title="DPO: rewards of both answers (their gap is the margin)")
    axes.set(xlabel="step", ylabel="beta × log-ratio, nats")
    axes.legend(frameon=False, loc="lower left")


def _draw_dpo_loss(axes: Axes, dpo: Metrics) -> None:
    _draw_curve(axes, dpo, "loss", DPO_COLOR, "loss, nats per pair")
    _draw_curve(axes, dpo, "reward_accuracy", SFT_COLOR, "reward accuracy (share of pairs)")
    axes.set_ylim(0, 1.02)
    axes.set(title="DPO: loss and reward accuracy", xlabel="step")
    axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.55))


def _draw_accuracy(axes: Axes, report: dict[str, Any]) -> None:
    sft, dpo = report["sft"], report["dpo"]
    names = [*sft["by_task"], "all"]
    for name, score, shift, color in (
        ("after SFT", sft, -0.2, SFT_COLOR),
        ("after DPO", dpo, 0.2, DPO_COLOR),
    ):
        values = [100 * value for value in (*score["by_task"].values(), score["accuracy"])]
        places = [place + shift for place in range(len(names))]
        bars = axes.bar(places, values, width=0.38, color=color, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=2, fontsize=9)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 115)
    axes.set_yticks(range(0, 101, 20))
    axes.set(title=f"Exact match on {report['num_eval']} held-out prompts", ylabel="percent")
    axes.legend(frameon=False, loc="upper left", ncols=2)


def _draw_curve(axes: Axes, metrics: Metrics, key: str, color: str, label: str) -> None:
    """The raw values faintly, and their running mean."""
    steps, values = metrics["step"], metrics[key]
    axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    axes.plot(steps, running_mean(values), color=color, linewidth=1.8, label=label)


def running_mean(values: Sequence[float]) -> list[float]:
    """Each value averaged with its neighbours, as many on either side; near the start, where curves are steep, with fewer,
    and at the end with those before it."""
    reach, means = max(1, round(SMOOTHING_SHARE * len(values) / 2)), []
    for i in range(len(values)):
        window = values[i - min(reach, i) : i + min(reach, i) + 1]
        means.append(sum(window) / len(window))
    return means
