"""benchmarks/step.py on a tiny model, without a peer; its record goes through the report's renderer."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TINY = {
    "model.num_layers": 1,
    "model.hidden_size": 32,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.ffn_hidden_size": 48,
    "model.vocab_size": 300,
    "data.pack_length": 512,
    "data.max_length": 192,
    "train.global_batch_packs": 2,
}


def benchmark(*arguments: object, expect: int = 0) -> str:
    command = [sys.executable, ROOT / "benchmarks" / "step.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def rendered(record: dict[str, Any]) -> str:
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks" / "report.py")
    assert spec is not None and spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    return report.step(record)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"

    def words(least: int, most: int) -> str:
        chosen = ("".join(rng.choices("abcdefgh", k=rng.randint(1, 6))) for _ in range(most))
        return " ".join([*chosen][: rng.randint(least, most)])

    with path.open("w") as out:
        for _ in range(120):
            prompt, short, long = words(2, 40), words(1, 9), words(10, 25)
            out.write(json.dumps({"prompt": prompt, "chosen": short, "rejected": long}) + "\n")
    return path


def test_record_and_report(tmp_path: Path, pairs: Path) -> None:
    out = tmp_path / "step.json"
    settings = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    given = ["--data", pairs, "--pairs", 40, "--blocks", 2, "--threads", 1, "--out", out]
    benchmark(*given, *settings, "--variants", "padded", "all_rows", "--skip-tests")

    record = json.loads(out.read_text())
    assert record["data"]["pairs"] == 40  # of 120 in the file
    assert pairs.parent.as_posix() not in out.read_text()  # no path of this machine
    providers = record["providers"]
    assert set(providers) == {"full", "padded", "all_rows"}
    for provider in providers.values():
        assert len(provider["blocks"]) == 2
        assert all(block["pairs"] >= 40 and block["seconds"] > 0 for block in provider["blocks"])
        assert abs(provider["warm_up"]["losses"][0] - math.log(2)) < 1e-5
    full, padded = providers["full"], providers["padded"]
    assert full["tokens_per_pair"] == pytest.approx(record["data"]["tokens_shared"] / 40, rel=0.3)
    assert padded["positions_per_pair"] > 1.1 * padded["tokens_per_pair"]  # rows have many lengths
    assert record["speedup"]["padded"]["median"] > 0

    parts = record["profile"]["seconds_per_step"]
    named = {"linear layers", "attention", "rotary positions", "output layer and log-softmax"}
    assert named | {"norms", "gradient buffers", "optimizer", "data"} <= set(parts)
    assert min(parts.values()) >= 0  # "between operations" is what all others leave
    assert parts["SwiGLU, residuals, embedding, loss, metrics"] < 0.5 * sum(parts.values())

    assert "pairs/s" in rendered(record) and "TRL" not in rendered(record)
    peer = {**full, "about": {**full["about"], "trl": "1.16.0", "batch_pairs": 8}}
    record["providers"] |= {"trl": peer, "in_order": full}
    record["speedup"] |= dict.fromkeys(["trl", "trl_same_batch"], record["speedup"]["padded"])
    record["agreement"] = {"ours": [0.69], "trl": [0.69], "largest_difference": 1e-6}
    assert "TRL 1.16.0" in rendered(record)


def test_says_what_is_missing(tmp_path: Path, pairs: Path) -> None:
    said = benchmark(expect=2)
    assert "huggingface.co/datasets/Anthropic/hh-rlhf" in said
    nowhere = tmp_path / "nothing"
    said = benchmark("--data", pairs, "--peer", "trl", "--peer-venv", nowhere, expect=2)
    assert str(nowhere) in said and "make peer-trl" in said
