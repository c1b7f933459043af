"""Data at scale: `python benchmarks/data.py --out FOLDER [--documents 10000000]` writes preference pairs, tokenises them with the code of
`nova prepare`, packs and loads them, and trains a tiny model on them; results go to results/data_cpu.json.

Tokenising is compared with plain SentencePiece and plain `tokenizers` on the same texts and cores, in turns, on the first --sample
documents: those get lists of strings that lie in memory and throw the ids away, ours reads JSON from a file and writes a store.
FOLDER needs about 700 bytes per document; what is in it is used again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import sentencepiece
import tokenizers
from run import ROOT, circumstances, git

from nova_sys.config_io import load_recipe
from nova_sys.data.loader import PackLoader
from nova_sys.data.packing import pack_documents
from nova_sys.data.prepare import prepare_data
from nova_sys.data.store import StoreSpec, build_store
from nova_sys.data.token_store import TokenStore
from nova_sys.data.tokenizer import load_tokenizer
from nova_sys.data.tokenizer_training import train_sentencepiece
from nova_sys.data.workers import available_cores

VOCAB_SIZE = 8000
PACK_LENGTH = 1024
SPECIAL_TOKENS = 3  # of a pair: BOS, and EOS behind each answer
ROUNDS = 3
RECIPE = """\
# A model so small that a step takes almost no time: the worst case for a loader.
[run]
dir = "{run}"
[model]
num_layers = 1
hidden_size = 32
num_heads = 2
num_kv_heads = 1
ffn_hidden_size = 64
[data]
train = "{train}"
tokenizer = "{tokenizer}"
cache_dir = "{cache}"
pack_length = {pack_length}
workers = {workers}
[algo]
name = "dpo"
loss = "simpo"
[train]
steps = {steps}
global_batch_packs = 1
[checkpoint]
every_steps = 0
[log]
tensorboard = false
every_steps = 100
"""


# The documents


def make_phrases(rng: np.random.Generator) -> list[str]:
    """Groups of one to five words, common words often: Zipf's law over made-up words of one to four syllables."""
    onsets = [*"bcdfghjklmnprstvw", "br", "ch", "fl", "pl", "sh", "st", "th", "tr"]
    vowels, codas = [*"aeiou"], ["", "", "n", "r", "s", "t", "l", "nd", "ng", "st"]
    found: dict[str, None] = {}
    while len(found) < 20_000:
        syllables = 1 + (len(found) > 300) + (len(found) > 3000) + int(rng.integers(2))
        parts = [rng.choice(kind) for _ in range(syllables) for kind in (onsets, vowels, codas)]
        found["".join(parts)] = None
    words = list(found)
    weights = 1 / np.arange(3, len(words) + 3)
    sizes = rng.integers(1, 6, 1 << 17)
    drawn = rng.choice(len(words), int(sizes.sum()), p=weights / weights.sum())
    ends = np.cumsum(sizes)
    return [" ".join([words[i] for i in group]) for group in np.split(drawn, ends[:-1])]


def write_documents(path: Path, count: int) -> None:
    """Preference pairs, about 45 tokens each; depends on `count` only in where it ends."""
    rng = np.random.default_rng(0)
    phrases = make_phrases(rng)
    partial = path.with_suffix(".partial")
    with partial.open("w") as stream:
        for start in range(0, count, 4096):
            rows = []
            for drawn in rng.integers(0, len(phrases), (4096, 9)).tolist():
                a, b, c, d, e, f, g, h, i = [phrases[k] for k in drawn]
                rows.append(
                    f'{{"prompt": "{a}, {b} {c}?", "chosen": "{d} {e}, {f}.", "rejected": "{g} {h} {i}."}}\n'
                )
            stream.writelines(rows[: count - start])
    partial.rename(path)


def texts_of(path: Path) -> Iterator[str]:
    with path.open() as stream:
        for line in stream:
            yield from json.loads(line).values()


def make_tokenizers(folder: Path, sample: Path) -> dict[str, Path]:
    """A SentencePiece model and a byte-level BPE of the same size, trained on the same texts."""
    texts = [text for text, _ in zip(texts_of(sample), range(60_000), strict=False)]
    paths = {"sentencepiece": folder / "tokenizer.model", "tokenizers": folder / "bpe"}
    if not paths["sentencepiece"].exists():
        train_sentencepiece(texts, VOCAB_SIZE, paths["sentencepiece"])
    if not paths["tokenizers"].exists():
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(texts, trainer)
        paths["tokenizers"].mkdir()
        model.save(str(paths["tokenizers"] / "tokenizer.json"))
        names = json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
        (paths["tokenizers"] / "tokenizer_config.json").write_text(names)
    return paths


# Measurements


class PeakMemory:
    """Private memory in MB: how much this process's grew at most, and the most of any child."""

    def __enter__(self) -> PeakMemory:
        self.own_growth_mb = self.worker_mb = 0.0
        self._before_mb, self._over = self._private_mb(os.getpid()), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            own_mb = self._private_mb(os.getpid()) - self._before_mb
            self.own_growth_mb = max(self.own_growth_mb, own_mb)
            children = [self._private_mb(child.pid) for child in psutil.Process().children()]
            self.worker_mb = max([self.worker_mb, *children])

    @staticmethod
    def _private_mb(pid: int) -> float:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        except OSError:
            return 0.0
        return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("RssAnon:")), 0.0)


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """`work(*arguments)` in a fresh process, where no earlier measurement has left memory behind."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def compare_tokenising(
    folder: Path, sample: Path, paths: dict[str, Path], cores: int
) -> list[dict[str, Any]]:
    """Seconds of each provider, in turns. Tokens are those of the texts, without BOS and EOS, for all."""
    texts = list(texts_of(sample))
    model = sentencepiece.SentencePieceProcessor(model_file=str(paths["sentencepiece"]))
    bpe = tokenizers.Tokenizer.from_file(str(paths["tokenizers"] / "tokenizer.json"))

    def nova(name: str) -> int:
        target = folder / "compared"
        for left in (target, target.with_name("compared.building")):  # from an interrupted run
            shutil.rmtree(left, ignore_errors=True)
        spec = StoreSpec(str(sample), load_tokenizer(paths[name]), "pairs", PACK_LENGTH)
        report = build_store(spec, target, num_workers=cores)
        return report.num_tokens - SPECIAL_TOKENS * report.num_documents

    providers: dict[tuple[str, str], Callable[[], int]] = {
        ("sentencepiece", "plain, EncodeAsIds"): lambda: sum(
            map(len, model.EncodeAsIds(texts, num_threads=cores))
        ),
        ("sentencepiece", "nova prepare"): lambda: nova("sentencepiece"),
        ("tokenizers", "plain, encode_batch_fast"): lambda: sum(
            len(encoding) for encoding in bpe.encode_batch_fast(texts, add_special_tokens=False)
        ),
        ("tokenizers", "nova prepare"): lambda: nova("tokenizers"),
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in providers}
    tokens: dict[tuple[str, str], int] = {}
    for _ in range(ROUNDS):
        for key, work in providers.items():
            taken_s, tokens[key] = timed(work)
            seconds[key].append(taken_s)
    for name in paths:
        assert len({count for key, count in tokens.items() if key[0] == name}) == 1, tokens
    return [
        {
            "tokenizer": name,
            "provider": provider,
            "tokens_per_s": round(tokens[name, provider] / statistics.median(taken)),
            "tokens_per_s_per_core": round(
                tokens[name, provider] / statistics.median(taken) / cores
            ),
            "documents_per_s": round(len(texts) / 3 / statistics.median(taken)),
            "seconds": taken,
        }
        for (name, provider), taken in seconds.items()
    ]


def measure_prepare(recipe: Path, cores: int) -> dict[str, Any]:
    """The work of `nova prepare`, hashing of the files and checking of the store included."""
    config = load_recipe(recipe, [])
    shutil.rmtree(config.data.cache_dir, ignore_errors=True)
    with PeakMemory() as memory:
        seconds, prepared = timed(lambda: prepare_data(config))
    store = prepared.store
    tokens = store.report.num_tokens - SPECIAL_TOKENS * store.num_documents
    size = sum(path.stat().st_size for path in store.folder.iterdir())
    return {
        "documents": store.num_documents,
        "tokens": tokens,
        "seconds": seconds,
        "documents_per_s": round(store.num_documents / seconds),
        "tokens_per_s": round(tokens / seconds),
        "tokens_per_s_per_core": round(tokens / seconds / cores),
        "store_bytes_per_document": round(size / store.num_documents, 1),
        "reader_growth_mb": round(memory.own_growth_mb),
        "worker_mb": round(memory.worker_mb),
    }


def open_store(recipe: Path) -> TokenStore:
    return prepare_data(load_recipe(recipe, []), verify=False).store


def measure_plan(recipe: Path) -> dict[str, Any]:
    lengths = open_store(recipe).document_lengths(True)
    pack_documents(lengths[:1000], PACK_LENGTH, seed=0, epoch=0)  # imports
    seconds = []
    with PeakMemory() as memory:
        for epoch in range(2):
            taken_s, plan = timed(
                lambda e=epoch: pack_documents(lengths, PACK_LENGTH, seed=0, epoch=e)
            )
            seconds.append(taken_s)
    kept = plan.order.nbytes + plan.offsets.nbytes
    return {
        "packs": plan.num_packs,
        "filled_percent": round(100 * int(lengths.sum()) / plan.num_packs / PACK_LENGTH, 2),
        "seconds_per_epoch": seconds,
        "bytes_per_document_peak": round(memory.own_growth_mb * 2**20 / len(lengths), 1),
        "bytes_per_document_kept": round(kept / len(lengths), 1),
    }


def measure_loader(recipe: Path, num_packs: int = 4000) -> dict[str, Any]:
    """One thread, packs from all over the store."""
    loader = PackLoader(
        open_store(recipe),
        pack_length=PACK_LENGTH,
        global_batch_packs=8,
        data_rank=0,
        data_size=1,
        seed=0,
        share_prefix=True,
    )
    seconds, _ = timed(lambda: [loader.micro_batches(step) for step in range(num_packs // 8)])
    return {
        "packs": num_packs,
        "packs_per_s": round(num_packs / seconds),
        "tokens_per_s": round(num_packs / seconds * PACK_LENGTH),
    }


def measure_training(recipe: Path, run_dir: Path) -> dict[str, Any]:
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, "-W", "ignore", "-m", "nova_sys.cli", "train", str(recipe)]
    subprocess.run(command, check=True, cwd=ROOT)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    waits_ms = [row["data_wait_ms"] for row in rows]
    step_ms = [1e3 * row["step_time_s"] for row in rows[1:]]
    return {
        "steps": len(rows),
        "step_ms_median": round(statistics.median(step_ms), 2),
        "packs_per_s": round(1e3 / statistics.median(step_ms), 1),
        "data_wait_ms_first": round(waits_ms[0], 2),
        "data_wait_ms_median": round(statistics.median(waits_ms[1:]), 3),
        "data_wait_ms_p99": round(float(np.percentile(waits_ms[1:], 99)), 3),
        "data_wait_ms_max": round(max(waits_ms[1:]), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the data")
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--sample", type=int, default=200_000, help="documents of the comparison")
    parser.add_argument("--steps", type=int, default=300, help="of the training run")
    arguments = parser.parse_args()
    folder, count = arguments.out.resolve(), arguments.documents
    folder.mkdir(parents=True, exist_ok=True)
    cores = available_cores()
    os.environ["RAYON_NUM_THREADS"] = str(cores)  # of tokenizers, read when it starts its threads
    documents, sample = (folder / f"pairs-{n}.jsonl" for n in (count, min(arguments.sample, count)))
    for path, number in ((documents, count), (sample, min(arguments.sample, count))):
        if not path.exists():
            print(f"writing {number:,} documents to {path}")
            write_documents(path, number)
    paths = make_tokenizers(folder, sample)
    recipe = folder / "recipe.toml"
    recipe.write_text(
        RECIPE.format(
            run=folder / "run",
            train=documents,
            tokenizer=paths["sentencepiece"],
            cache=folder / "cache",
            pack_length=PACK_LENGTH,
            workers=cores,
            steps=arguments.steps,
        )
    )
    compared = compare_tokenising(folder, sample, paths, cores)
    record = {
        **circumstances(),
        "command": f"python benchmarks/data.py --out FOLDER --documents {count}",
        "documents": count,
        "mb": round(documents.stat().st_size / 1e6),
        "cores_used": cores,
        "sample_documents": min(arguments.sample, count),
        "tokenising": compared,
        "prepare": alone(measure_prepare, recipe, cores),
        "planning": alone(measure_plan, recipe),
        "loader": alone(measure_loader, recipe),
        "training": measure_training(recipe, folder / "run"),
    }
    sources = ["csrc", "nova_sys", "benchmarks/data.py"]
    record["uncommitted"] = bool(git("status", "--porcelain", "--", *sources))
    record["versions"] |= {
        "sentencepiece": sentencepiece.__version__,
        "tokenizers": tokenizers.__version__,
    }
    path = ROOT / "benchmarks" / "results" / "data_cpu.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
