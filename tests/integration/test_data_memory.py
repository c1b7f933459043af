"""Memory of building a token store and of loading it, by the number of documents."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from nova_sys.data.loader import PackLoader
from nova_sys.data.store import StoreSpec, build_store
from nova_sys.data.token_store import TokenStore
from nova_sys.data.tokenizer_training import train_sentencepiece

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs"]


def pairs(count: int) -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(count):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(2, 8))) for _ in range(3)]
        record = dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
        yield json.dumps(record) + "\n"


class Watch:
    """Largest private memory of this process and of each of its children, in MB above what it began with."""

    def __enter__(self) -> Watch:
        self.ours_mb, self.children_mb = 0.0, 0.0
        self._began, self._over = self._private_mb(os.getpid()), threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            self.ours_mb = max(self.ours_mb, self._private_mb(os.getpid()) - self._began)
            for child in psutil.Process().children():
                self.children_mb = max(self.children_mb, self._private_mb(child.pid))

    @staticmethod
    def _private_mb(pid: int) -> float:
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return 0.0
        kib = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
        return int(kib[0]) / 1024 if kib else 0.0


def alone(work: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """`work()` in a copy of this process, which no earlier work has left memory in."""
    queue = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(target=lambda: queue.put(work()))
    process.start()
    result = queue.get()
    process.join()
    return result


def memory_of_building(spec: StoreSpec, folder: Path) -> tuple[float, float]:
    with Watch() as watch:
        build_store(spec, folder, num_workers=2)
    return watch.ours_mb, watch.children_mb


def memory_of_loading(folder: Path) -> tuple[float, float]:
    """Of the second epoch too, with reference log-probs; and the number of documents."""
    opened = TokenStore.open(folder, verify=False)
    with Watch() as watch:
        loader = PackLoader(
            opened, pack_length=256, global_batch_packs=8, data_rank=0, data_size=2, seed=0,
            share_prefix=True, ref_logp=np.ones(opened.num_responses),
        )  # fmt: skip
        loader.start(0)
        for _ in range(20):
            loader.next()
        loader.stop()
    return watch.ours_mb, opened.num_documents


@pytest.mark.slow
def test_memory_per_document(tmp_path: Path) -> None:
    """With four times the documents, building takes no more memory, and loading what its docstring says."""
    measured = []
    some = list(pairs(20_000))
    tokenizer = train_sentencepiece([" ".join(WORDS)] * 3, 320, tmp_path / "t.model")
    for number in (250_000, 1_000_000):  # the tokens of a million are 200 MB
        data, folder = tmp_path / f"{number}.jsonl", tmp_path / str(number)
        with data.open("w") as stream:
            for i in range(number // 20_000 + 1):
                stream.writelines((some[i:] + some[:i])[: number - 20_000 * i])
        spec = StoreSpec(str(data), tokenizer, "pairs", 256)
        built = alone(lambda spec=spec, folder=folder: memory_of_building(spec, folder))
        measured.append((*built, *alone(lambda folder=folder: memory_of_loading(folder))))
    print("MB of the builder, MB of its largest worker, MB of a loader, documents:", *measured)
    small, large = measured
    assert large[0] < small[0] + 10 and large[0] < 120
    assert large[1] < small[1] + 20 and 20 < large[1] < 200
    bytes_per_document = (large[2] - small[2]) * 2**20 / (large[3] - small[3])
    assert 30 < bytes_per_document < 95  # 16 for log-probs, and what the loader says of its plans
