"""How fast DPO trains on a CPU: `python benchmarks/step.py --data PAIRS --peer trl` measures this package's trainer against TRL's on the same
pairs, and what packing, sharing and compacted response rows each contribute. Writes results/step_cpu.json.

Every provider is a process of its own that trains only while it is told to. They take turns, so that a busy moment of the machine hits all.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from run import ROOT, circumstances, git

HERE = ROOT / "benchmarks"
TESTS = ["tests/unit/test_model_sharing.py", "tests/kernels/test_packed_attention.py"]
VARIANTS = ("full", "in_order", "unshared", "padded", "all_rows", "plain", "one_pack")
SAME_STEPS = {
    "padded": "full",
    "all_rows": "full",
    "plain": "unshared",
}  # the same documents in each step
WARMUP_PAIRS = 32
AGREEMENT_STEPS = 10
LARGEST_DISAGREEMENT = 1e-4
"""Of a loss from TRL's on the same batch; a wrong mask, position or weight layout is a hundred times that."""
PROFILED_STEPS = 4
SOURCE = "https://huggingface.co/datasets/Anthropic/hh-rlhf, file harmless-base/test.jsonl.gz"


class Provider:
    """A process that trains on command; see gate.py."""

    def __init__(self, name: str, command: Sequence[str | Path], threads: int, log: Path) -> None:
        self.name, self._log = name, log
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "0"}
        self._process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
            env=environment,
        )
        self.about = self._read()

    def train(self, pairs: int) -> dict[str, Any]:
        """One block: optimizer steps until `pairs` pairs are done."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"train {pairs}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text()[-2000:]
            raise RuntimeError(f"{self.name} ended with {self._process.wait()}:\n{said}")
        return json.loads(line)


class Providers:
    """Starts providers that share a work folder, and threads."""

    def __init__(self, work: Path, threads: int, changes: Sequence[str], peer: Path | None) -> None:
        self.work, self.threads, self.peer = work, threads, peer
        self.changes = [part for change in changes for part in ("--set", change)]

    @contextmanager
    def ours(self, variant: str, *arguments: str) -> Iterator[Provider]:
        command = [sys.executable, HERE / "step_ours.py", "--work", self.work, *self.changes]
        with self._running(variant, [*command, "--variant", variant, *arguments]) as provider:
            yield provider

    @contextmanager
    def trl(self, *arguments: str) -> Iterator[Provider]:
        assert self.peer is not None
        command: list[str | Path] = [self.peer / "bin" / "python", HERE / "step_trl.py"]
        command += ["--given", self.work / "given", "--out", self.work / "trl", *arguments]
        with self._running("trl", command) as provider:
            yield provider

    @contextmanager
    def _running(self, name: str, command: list[str | Path]) -> Iterator[Provider]:
        provider = Provider(name, command, self.threads, self.work / f"{name}.log")
        try:
            yield provider
        finally:
            provider.close()


def measure(providers: Providers, names: Sequence[str], blocks: int, pairs: int) -> dict[str, Any]:
    """Per provider what it is, and its blocks; the first, a warm-up, is not among them."""
    with ExitStack() as stack:
        running = []
        for name in names:
            opened = providers.trl() if name == "trl" else providers.ours(name)
            running.append(stack.enter_context(opened))
        results: dict[str, Any] = {}
        for provider in running:
            check_equal_terms(provider.name, provider.about, providers.threads)
            warm_up = provider.train(WARMUP_PAIRS)
            results[provider.name] = {"about": provider.about, "warm_up": warm_up, "blocks": []}
        check_losses(results)
        for number in range(blocks):
            for provider in running:
                block = provider.train(pairs)
                results[provider.name]["blocks"].append(block)
                speed = block["pairs"] / block["seconds"]
                print(
                    f"block {number + 1}/{blocks}  {provider.name:<9} {speed:6.2f} pairs/s",
                    flush=True,
                )
    for result in results.values():
        result |= summary(result["blocks"])
    return results


def check_equal_terms(name: str, about: dict[str, Any], threads: int) -> None:
    """Raises: RuntimeError when a provider runs with other threads, another torch, or denormals."""
    wanted = {"threads": threads, "torch": version("torch"), "denormals_flushed": True}
    seen = {key: about[key] for key in wanted}
    if seen != wanted:
        raise RuntimeError(f"{name} runs with {seen}, which is not {wanted}")


def check_losses(results: dict[str, Any]) -> None:
    """Variants change what a step costs, not what it computes."""
    for name, same in SAME_STEPS.items():
        if name in results and same in results:
            losses = [results[n]["warm_up"]["losses"] for n in (name, same)]
            if max(abs(a - b) for a, b in zip(*losses, strict=True)) > 1e-4:
                raise RuntimeError(f"{name} and {same} train the same pairs to losses {losses}")


def summary(blocks: list[dict[str, Any]]) -> dict[str, float]:
    def over_all(name: str, per: str) -> float:
        return sum(block[name] for block in blocks) / sum(block[per] for block in blocks)

    speeds = [block["pairs"] / block["seconds"] for block in blocks]
    return {
        "pairs_per_s": statistics.median(speeds),
        "pairs_per_s_least": min(speeds),
        "pairs_per_s_most": max(speeds),
        "tokens_per_pair": over_all("tokens", "pairs"),
        "positions_per_pair": over_all("positions", "pairs"),
        "pairs_per_step": statistics.mean(b["pairs"] / len(b["losses"]) for b in blocks),
        "peak_rss_gib": max(block["peak_rss_gib"] for block in blocks),
    }


def ratios(results: dict[str, Any], faster: str, slower: str) -> dict[str, float]:
    """How many times the pairs per second, per round of turns: median, least, most."""
    per_round = [
        (a["pairs"] / a["seconds"]) / (b["pairs"] / b["seconds"])
        for a, b in zip(results[faster]["blocks"], results[slower]["blocks"], strict=True)
    ]
    return {"median": statistics.median(per_round), "least": min(per_round), "most": max(per_round)}


def agreement(providers: Providers, pairs_per_step: int) -> dict[str, Any]:
    """Losses of the same steps on the same batches, in ours and in TRL's."""
    pairs = AGREEMENT_STEPS * pairs_per_step
    with providers.ours("in_order") as ours:
        our_losses = ours.train(pairs)["losses"]
    with providers.trl("--in-order") as theirs:
        their_losses = theirs.train(pairs)["losses"]
    differences = [abs(a - b) for a, b in zip(our_losses, their_losses, strict=True)]
    if not max(differences) <= LARGEST_DISAGREEMENT:
        raise RuntimeError(f"not the same training: losses {our_losses}, TRL's {their_losses}")
    return {"ours": our_losses, "trl": their_losses, "largest_difference": max(differences)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help=f"preference pairs: {SOURCE}")
    parser.add_argument("--peer", choices=["trl"], help="measure against it, too")
    parser.add_argument(
        "--peer-venv",
        type=Path,
        default=ROOT / ".venv" / "peer-trl",
        help="made by `make peer-trl`",
    )
    parser.add_argument("--pairs", type=int, default=256, help="the first of the data; a block")
    parser.add_argument("--blocks", type=int, default=5, help="timed ones per provider")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS[1:], default=VARIANTS[1:])
    parser.add_argument("--work", type=Path, help="folder to keep; else a temporary one")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "step_cpu.json"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="another model, for tests"
    )
    parser.add_argument("--skip-tests", action="store_true", help="of what is measured")
    arguments = parser.parse_args()
    if arguments.data is None or not arguments.data.is_file():
        parser.error(
            f"--data {arguments.data or ''}: no such file; download hh-rlhf from {SOURCE}, or give other pairs"
        )
    if arguments.peer and not (arguments.peer_venv / "bin" / "python").exists():
        parser.error(
            f"--peer-venv {arguments.peer_venv}: no environment there; run `make peer-trl`"
        )
    return arguments


def tests_pass() -> bool:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS], cwd=ROOT).returncode == 0


def about_this_run(arguments: argparse.Namespace) -> dict[str, Any]:
    given = [f"--data {arguments.data.name}", *(["--peer trl"] if arguments.peer else [])]
    given += [f"--{name} {getattr(arguments, name)}" for name in ("pairs", "blocks", "threads")]
    measured = ["csrc", "kernels", "nova_sys", "launch/recipes", "benchmarks/*.py"]
    return {
        **circumstances(),
        "threads": arguments.threads,
        "command": " ".join(["python benchmarks/step.py", *given]),
        "uncommitted": bool(git("status", "--porcelain", "--", *measured)),
    }


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    peer = arguments.peer_venv if arguments.peer else None
    providers = Providers(work, arguments.threads, arguments.set, peer)
    with providers.ours(
        "full", "--prepare", str(arguments.data), "--pairs", str(arguments.pairs)
    ) as p:
        data = p.about
    names = ["full", *(["trl"] if peer else []), *arguments.variants]
    record: dict[str, Any] = {"data": data}
    if peer:
        record["agreement"] = agreement(providers, data["peer_batch_pairs"])
    with providers.ours("full", "--profile", str(PROFILED_STEPS)) as profiled:
        record["profile"] = profiled.about
    results = measure(providers, names, arguments.blocks, arguments.pairs)
    record["providers"] = results
    record["speedup"] = {name: ratios(results, "full", name) for name in names[1:]}
    if peer:
        record["speedup"]["trl_same_batch"] = ratios(results, "in_order", "trl")
    return record


def main() -> int:
    arguments = parse_arguments()
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    os.sched_setaffinity(0, cores)  # and all that are started from here
    if not arguments.skip_tests and not tests_pass():
        print(f"{' '.join(TESTS)} fail, so there is nothing to measure", file=sys.stderr)
        return 1
    with ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        record = {**about_this_run(arguments), **run(arguments, work.resolve())}
    record["load_average_at_end"] = os.getloadavg()[0]
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["speedup"], indent=2))
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
