"""Renders benchmarks/results/*.json into README.md, docs/trust.md and the ops' READMEs, between their `results` marks, and into pictures (plots.py).
`--check` only says whether these are up to date."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plots
from plots import machine
from report_gpu import fp8_gate, gpu_check, gpu_step
from report_kernels import kernel_table, linear_dpo

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- results: rendered by benchmarks/report.py -->", "<!-- /results -->"


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


def data(record: dict[str, Any]) -> str:
    prepare, planning = record["prepare"], record["planning"]
    loader, training = record["loader"], record["training"]
    plan_s = statistics.median(planning["seconds_per_epoch"])
    lines = [
        f"**Data at scale**: {record['documents']:,} preference pairs ({prepare['tokens'] / 1e6:,.0f} million tokens, {record['mb']:,} MB of "
        f"JSON) tokenised in {prepare['seconds'] / 60:.1f} minutes on {record['cores_used']} cores ({machine(record)}): "
        f"{prepare['documents_per_s']:,} documents/s. The reading process grew by {prepare['reader_growth_mb']} MB at most, a tokenising one "
        f"took {prepare['worker_mb']} MB; the store takes {prepare['store_bytes_per_document']:.0f} bytes per document. An epoch's plan takes "
        f"{plan_s:.1f} s and {planning['bytes_per_document_kept']:.0f} bytes per document ({planning['bytes_per_document_peak']:.0f} while it "
        f"is made), ahead of time; one thread builds {loader['packs_per_s']:,} packs of 1,024 tokens per second. A model that trains "
        f"{training['packs_per_s']:,.0f} packs/s waits {training['data_wait_ms_median']:.2f} ms per step for data (median; 99%: "
        f"{training['data_wait_ms_p99']:.2f}, most: {training['data_wait_ms_max']:.2f}).",
        "",
        f"The same {record['sample_documents']:,} documents, in turns; the plain libraries get strings in memory and keep nothing, "
        "`nova prepare` reads JSON and writes a store:",
        "",
        "| tokenizer | provider | tokens/s per core |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['tokenizer']} | {row['provider']} | {row['tokens_per_s_per_core']:,} |"
        for row in record["tokenising"]
    ]
    return "\n".join(lines)


VARIANTS = {  # as benchmarks/step.py calls them
    "unshared": "every answer with its own copy of the prefix",
    "padded": "8 pairs padded to the longest, instead of packs",
    "all_rows": "every token through the output layer, instead of response rows",
    "plain": "all three",
    "one_pack": "an optimizer step after every pack",
}


def step(record: dict[str, Any]) -> str:
    return "\n\n".join(part(record) for part in (step_speed, step_variants, step_profile))


def step_speed(record: dict[str, Any]) -> str:
    data, ours = record["data"], record["providers"]["full"]
    lines = [
        f"**Speed on a CPU**: DPO on {data['pairs']} pairs of hh-rlhf, `dpo_hh_small` ({data['parameters'] / 1e6:.1f} million parameters), fp32, "
        f"{record['threads']} threads ({machine(record)}); {len(ours['blocks'])} blocks of {data['pairs']} pairs each in turns, medians:",
        "",
        "| trainer | pairs/s | pairs per step | positions computed per pair | peak memory |",
        "|---|---|---|---|---|",
        step_row("this package", ours),
    ]
    if "trl" not in record["providers"]:
        return "\n".join(lines)
    trl, times = record["providers"]["trl"], record["speedup"]["trl"]
    eight, same_batch = record["providers"]["in_order"], record["speedup"]["trl_same_batch"]
    steps, off = len(record["agreement"]["ours"]), record["agreement"]["largest_difference"]
    lines += [
        step_row(f"this package, {data['peer_batch_pairs']} pairs per step as TRL", eight),
        step_row(f"TRL {trl['about']['trl']}, `DPOTrainer`", trl),
        "",
        f"That is **{times['median']:.1f} times** TRL ({times['least']:.1f} to {times['most']:.1f} in single rounds) as the recipe trains, and "
        f"**{same_batch['median']:.1f} times** ({same_batch['least']:.1f} to {same_batch['most']:.1f}) with TRL's batches. Both start from the same "
        f"weights, train the same token ids (at most {data['max_length']} a sequence) with the reference log-probs computed before, on as many threads, "
        f"and flush denormals. On the same batches of {data['peer_batch_pairs']} their losses over {steps} steps differ by at most {off:.1e}.",
    ]
    return "\n".join(lines)


def step_row(name: str, provider: dict[str, Any]) -> str:
    return (
        f"| {name} | {provider['pairs_per_s']:.1f} | {provider['pairs_per_step']:.1f} | {provider['positions_per_pair']:.0f} "
        f"| {provider['peak_rss_gib']:.1f} GiB |"
    )


def step_variants(record: dict[str, Any]) -> str:
    lines = ["| what each contributes: the same with | pairs/s | slower by |", "|---|---|---|"]
    for name, meaning in VARIANTS.items():
        if name in record["providers"]:
            speed, times = record["providers"][name]["pairs_per_s"], record["speedup"][name]
            spread = f"{times['least']:.2f} to {times['most']:.2f}"
            lines.append(f"| {meaning} | {speed:.1f} | {times['median']:.2f} times ({spread}) |")
    return "\n".join(lines)


def step_profile(record: dict[str, Any]) -> str:
    profile = record["profile"]
    parts = sorted(profile["seconds_per_step"].items(), key=lambda part: -part[1])
    shares = [f"{name} {seconds / profile['seconds_profiled']:.0%}" for name, seconds in parts]
    return f"Where a step's time goes (`torch.profiler`): {', '.join(shares)}."


PARITY_NAMES = {"ipo": "IPO", "simpo": "SimPO", "orpo": "ORPO"}  # others read as they are


def parity(record: dict[str, Any]) -> str:
    logp, bounds, data = record["logp"], record["bounds"], record["data"]
    training, model, trl = record["training"], record["model"], record["peer_versions"]["trl"]
    left_out = f", {data['left_out']} records passed over for long, blank or several-turn answers" if data["left_out"] else ""  # fmt: skip
    lines = [
        f"**The same numbers as TRL** (`{record['command']}`): TRL {trl} in its own environment and this package read one Hugging Face folder "
        f"({model['architecture']}, {model['parameters']:,} random parameters) and {data['pairs']} pairs ({data['file']}{left_out}), and tokenise them by "
        f"themselves to the same ids. fp32, CPU, threads: {record['threads']} ({machine(record)}). Summed log-probs (to {-logp['least']:.0f} nats) differ by "
        f"at most {max(logp['policy'], logp['reference']):.1e} nats, allowed {bounds['logp']:.0e}; from fp64, ours by {logp['ours_from_fp64']:.1e}, TRL's by "
        f"{logp['theirs_from_fp64']:.1e}. Largest differences otherwise; weights relative to a tensor's largest element, the update relative to its norm:",
        "",
        f"| loss | TRL's trainer | loss of a pair | loss of a step | weights after {training['steps']} AdamW steps | they moved by | update |",
        "|---|---|---|---|---|---|---|",
        *(parity_row(row) for row in record["results"]),
        "",
        f"Allowed: {bounds['loss']:.0e} of a loss, {bounds['parameters']:.0e} of the weights, {bounds['update']:.0e} of the update. Ours are what "
        "`nova convert to-hf` writes, TRL's what `save_pretrained` does. But for one row, the reference is another model than the policy's first weights. "
        "IPO divides log-probs by tokens in both. TRL's ORPO averages its NLL over all tokens of a batch, prompts included; ours over the tokens of each "
        "chosen answer. So its odds ratio is compared on the pairs, and the whole of it on their answers without prompts, one pair at a time. SimPO is "
        "`CPOTrainer` with `cpo_alpha` 0; it and `ORPOTrainer` are in `trl.experimental`.",
    ]
    return "\n".join(lines)


def parity_row(row: dict[str, Any]) -> str:
    loss, *rest = row["case"].split(", ")
    name = ", ".join([PARITY_NAMES.get(loss, loss), *rest])
    cells = [name, f"`{row['trainer']}`", f"{row['pairs']:.1e}"]
    after = row.get("parameters")
    cells += [f"{x:.1e}" for x in (row["steps"], *(after[k] for k in ("difference", "moved", "update")))] if after else [""] * 4  # fmt: skip
    return f"| {' | '.join(cells)} |"


MEASURED = {  # column of the table -> its heading
    "loss": "loss",
    "metrics": "other metrics",
    "grad_norm": "gradient norm",
    "gradients": "gradients",
    "weights": "weights",
}


def one_truth(record: dict[str, Any]) -> str:
    rows = record["results"]
    versions = record["versions"]
    lines = [
        f"Measured by `{record['command']}` on an {machine(record)} (torch {versions['torch']}, megatron-core {versions['megatron-core']}). "
        "Largest difference from the run named in the first column, relative to the value or to the tensor's largest element; "
        "0 is bit for bit:",
        "",
        "| run | computed as | " + " | ".join(MEASURED.values()) + " |",
        "|---|---|" + "---|" * len(MEASURED),
    ]
    family = None
    for row in rows:
        run = "" if row["family"] == family else f"{row['family']}; {row['truth']}"
        family = row["family"]
        cells = (
            "" if row[key] is None else f"{row[key]:.1e}" if row[key] else "0" for key in MEASURED
        )
        lines.append(f"| {run} | {row['case']} | " + " | ".join(cells) + " |")
    for bound in sorted({row["bound"] for row in rows}, reverse=True):
        of_bound = [row for row in rows if row["bound"] == bound]
        largest = max(row[key] for row in of_bound for key in MEASURED if row[key] is not None)
        precision = "fp32" if bound > 1e-9 else "fp64"
        lines += ["", f"{len(of_bound)} comparisons in {precision}: largest {largest:.1e}, allowed {bound:.0e}."]  # fmt: skip
    return "\n".join(lines)


Sections = dict[str, Callable[[dict[str, Any]], str]]
SECTIONS: Sections = {
    "demo_cpu": demo,
    "step_cpu": step,
    "parity_cpu": parity,
    "layouts_cpu": layouts,
    "linear_dpo_cpu": linear_dpo,
    "packing_cpu": packing,
    "data_cpu": data,
}
PICTURES = {  # behind the section of a result -> the picture
    "step_cpu": "step_cpu.png",
    "linear_dpo_cpu": "peers_cpu.png",
}
MISSING = {  # name of a result -> what it would show
    "gpu_step_h100": "**A DPO step at Llama 3 8B's layer shapes on an H100**, and the same in TRL with Liger",
    "fp8_gate_h100": "**FP8 beside bf16**, loss curves of 200 DPO steps",
    "gpu_check_h100": "**`make gpu-check` on an H100**: what passed, and the ceilings",
}
GPUS = [g for g in ("h100", "h200", "gpu") if (RESULTS / f"gpu_check_{g}.json").exists()] or [
    "h100"
]
for gpu in GPUS:
    SECTIONS |= {f"gpu_step_{gpu}": gpu_step, f"fp8_gate_{gpu}": fp8_gate}
    SECTIONS |= {f"gpu_check_{gpu}": gpu_check}
    PICTURES |= {f"gpu_step_{gpu}": f"step_{gpu}.png", f"gpu_check_{gpu}": f"peers_{gpu}.png"}


TRUST_SECTIONS: Sections = {"one_truth_cpu": one_truth}
OPS_FOLDER = "kernels/nova_kernels"


def kernel_sections(op: str) -> Sections:
    """Every machine on which the op has been measured."""
    return {path.stem: kernel_table for path in sorted(RESULTS.glob(f"{op}_*.json"))} or {
        f"{op}_h100": kernel_table
    }


DOCUMENTS = {
    "README.md": SECTIONS,
    "docs/trust.md": TRUST_SECTIONS,
    f"{OPS_FOLDER}/linear_dpo_loss/README.md": kernel_sections("linear_dpo"),
    f"{OPS_FOLDER}/packed_attention/README.md": kernel_sections("packed_attention"),
    f"{OPS_FOLDER}/kv_shift_rope/README.md": kernel_sections("kv_shift_rope"),
}


def render(sections: Sections) -> str:
    parts, drawn = [], plots.all_plots(RESULTS)
    for name, section in sections.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            how = " (`make gpu-check`)" if name.endswith(("h100", "h200")) else ""
            parts.append(f"{MISSING.get(name, f'*{name}*')}: not measured yet{how}.")
            continue
        parts.append(section(json.loads(path.read_text())))
        if sections is SECTIONS and (picture := PICTURES.get(name)) in drawn:
            parts.append(f"![{drawn[picture].alt}](docs/images/{picture})")
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, False
    for missing in (n for n in TRUST_SECTIONS if not (RESULTS / f"{n}.json").exists()):
        if check:  # a promise is nothing without its measurement
            print(f"docs/trust.md shows {missing}, which has not been measured", file=sys.stderr)
            stale = True
    if not check:
        plots.draw_all(RESULTS)
    for name in plots.stale(RESULTS):
        print(f"docs/images/{name} does not show benchmarks/results: run python benchmarks/report.py", file=sys.stderr)  # fmt: skip
        stale = True
    for name, sections in DOCUMENTS.items():
        text = (ROOT / name).read_text()
        before, rest = text.split(BEGIN)
        rendered = f"{before}{BEGIN}\n\n{render(sections)}\n\n{END}{rest.split(END)[1]}"
        if not check:
            (ROOT / name).write_text(rendered)
        elif rendered != text:
            print(
                f"{name} does not show benchmarks/results: run python benchmarks/report.py",
                file=sys.stderr,
            )
            stale = True
    return int(stale)


if __name__ == "__main__":
    sys.exit(main())
