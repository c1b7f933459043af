"""Renders benchmarks/results/*.json into the README, between its `results` marks. `--check` only says whether that is up to date."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: rendered by benchmarks/report.py -->", "<!-- /results -->"


def machine(record: dict[str, Any]) -> str:
    return f"{record['cpu']}, {record['cores']} cores"


def demo(record: dict[str, Any]) -> str:
    lines = [
        f"**`make demo`**, {len(record['seeds'])} seeds, {record['num_eval']} held-out prompts each ({machine(record)}, "
        f"{max(s['seconds_total'] for s in record['seeds']) / 60:.1f} minutes at most). Exact match, greedy:",
        "",
        "| seed | after SFT | after DPO | reward accuracy |",
        "|---|---|---|---|",
    ]
    for run in record["seeds"]:
        lines.append(
            f"| {run['seed']} | {run['sft']['accuracy']:.1%} | {run['dpo']['accuracy']:.1%} | {run['dpo']['reward_accuracy']:.1%} |"
        )
    return "\n".join(lines)


def layouts(record: dict[str, Any]) -> str:
    largest = record["largest_relative_difference"]
    return (
        f"**One truth on every layout**: {record['steps']} DPO steps on hh-rlhf (`{record['recipe']}`), one process against four (TP2 x PP2, "
        f"sequence parallel): first losses {record['first_loss']['one']:.7f} and {record['first_loss']['four']:.7f} (ln 2 = 0.6931472), "
        f"largest relative difference of any step's loss {largest['loss']:.1e}, of its gradient norm {largest['grad_norm']:.1e}."
    )


def packing(record: dict[str, Any]) -> str:
    lines = [
        f"**Packing**, one core ({machine(record)}):",
        "",
        "| documents | placed | documents/s | filled |",
        "|---|---|---|---|",
    ]
    for row in record["results"]:
        median = statistics.median(row["seconds"])
        lines.append(
            f"| {row['case']} | {row['provider']} | {row['median'] / 1e6:.0f} million ({median:.2f} s) | {row['fill_percent']:.2f}% |"
        )
    return "\n".join(lines)


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "demo_cpu": demo,
    "layouts_cpu": layouts,
    "packing_cpu": packing,
}


def render() -> str:
    parts = []
    for name, section in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        parts.append(
            section(json.loads(path.read_text()))
            if path.exists()
            else f"*{name}: not measured yet.*"
        )
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    rendered = f"{before}{BEGIN}\n\n{render()}\n\n{END}{rest.split(END)[1]}"
    if parser.parse_args().check:
        if rendered != text:
            print(
                "README.md does not show benchmarks/results: run python benchmarks/report.py",
                file=sys.stderr,
            )
        return int(rendered != text)
    readme.write_text(rendered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
