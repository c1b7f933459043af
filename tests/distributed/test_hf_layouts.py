"""Hugging Face folders on every layout: the log-probs of transformers, each rank reads its slices only, and the options that such
models bring (biases, norms of queries and keys) have the gradients of one rank."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from nova_kernels.testing import run_ranks

pytest.importorskip("transformers")


def beside(path: str) -> Any:
    file = (Path(__file__).parent / path).resolve()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hf_models, layout_runs = beside("../unit/hf_models.py"), beside("layout_runs.py")

FAMILIES = ("llama3", "qwen2", "mistral", "qwen3", "baichuan", "baichuan-m1-windows")
"""The first two are tied."""
LAYOUTS: dict[str, dict[str, Any]] = {  # of two ranks
    "tp2": {"tensor": 2},
    "tp2-sp": {"tensor": 2, "sequence": True},
    "pp2": {"pipeline": 2},
    "pp2-vpp2": {"pipeline": 2, "virtual_pipeline": 2},
}
OPTIONS = {"model.qkv_bias": True, "model.qk_norm": True, "model.head_dim": 24, "algo.name": "sft"}
OPTIONS |= {"model.rope_scaling": "linear", "model.rope_factor": 2.0, "train.steps": 2}
RUNS = {
    "tp2": {"parallel.tensor": 2},
    "tp2-sp": {"parallel.tensor": 2, "parallel.sequence": True},
}


def load_and_train(
    rank: int, folder: str, ids: list[int], data: str, cases: list[Any]
) -> tuple[dict[str, Any], list[Any]]:
    """`run_ranks` worker: for each layout and family (logits or None, elements read, elements held), and the runs of `cases`."""
    from nova_sys.config import ParallelConfig
    from nova_sys.parallel import parallel_run

    found = {}
    for name, layout in LAYOUTS.items():
        with parallel_run(ParallelConfig(**layout), seed=1) as parallel:
            torch.set_num_threads(1)  # the tensors are tiny, and the machine may be busy
            for family in FAMILIES:
                found[f"{family} {name}"] = load(Path(folder) / family, parallel, ids)
    return found, layout_runs.run_layouts(rank, data, cases)


def load(folder: Path, parallel: Any, ids: list[int]) -> tuple[Any, int, int]:
    from nova_kernels.segments import segment_index
    from nova_sys.config_io import config_from
    from nova_sys.decode import Decoder
    from nova_sys.hf.folder import HFFolder
    from nova_sys.hf.weights import load_any_weights
    from nova_sys.model.attention import PackLayout
    from nova_sys.model.build import build_model, shards_of, transformer_config

    model = config_from([f"model.init_from={folder}"], folder).model
    num_read = 0
    read = HFFolder.slice

    def counted(self: HFFolder, *args: Any) -> torch.Tensor:
        nonlocal num_read
        part = read(self, *args)
        num_read += part.numel()
        return part

    config = transformer_config(model, parallel, dtype=torch.float32)
    sizes = {"vocab_size": model.vocab_size, "max_positions": 256}
    chunks = build_model(model, config, parallel, **sizes, seed=1)
    with mock.patch.object(HFFolder, "slice", counted):
        load_any_weights(folder, chunks, model, model.vocab_size)
    held = sum(unpadded(shard, model.vocab_size) for c in chunks for shard in shards_of(c))
    decoder = Decoder(chunks, parallel, pack_length=256, num_ids=model.vocab_size)
    segments = torch.tensor([[0, len(ids), 0, 0]], dtype=torch.int32)
    pack = PackLayout(segments, segment_index(segments, len(ids)))
    with torch.no_grad():
        logits = decoder._forward(torch.tensor(ids), pack, torch.arange(len(ids)))
    return logits, num_read, held


def unpadded(shard: Any, vocab_size: int) -> int:
    """Elements of a shard, without the padding of the vocabulary."""
    if "word_embeddings" not in shard.key and "output_layer" not in shard.key:
        return shard.data.numel()
    rows = min(vocab_size, shard.global_offset[0] + shard.data.shape[0]) - shard.global_offset[0]
    return max(rows, 0) * shard.data.shape[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = (
        {
            "prompt": f"Q{i} {'ab' * (i % 7)}",
            "chosen": f" A{i * i} {'cd' * (i % 5)}",
            "rejected": "no",
        }
        for i in range(40)
    )
    path = tmp_path_factory.mktemp("options") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def case(data: Path, name: str, changes: dict[str, Any]) -> tuple[str, dict[str, Any], tuple]:
    return str(data.parent / name / "run"), {**OPTIONS, **changes}, ()


@pytest.fixture(scope="module")
def one_rank(data: Path) -> dict[str, Any]:
    """Its run trains the tokenizer of the others."""
    return run_ranks(layout_runs.run_layouts, 1, str(data), [case(data, "one", {})], timeout_s=300)[
        0
    ][0]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folders, and the log-probs that transformers gives them."""
    root = tmp_path_factory.mktemp("hf")
    logps = {}
    for name in FAMILIES:
        reference = hf_models.make(name, root / name)
        with torch.no_grad():
            logits = hf_models.reference_logits(reference, hf_models.probe_ids())
        logps[name] = logits.log_softmax(-1)
    return root, logps


@pytest.fixture(scope="module")
def two_ranks(
    references: tuple[Path, Any], one_rank: dict[str, Any], data: Path
) -> list[tuple[dict[str, Any], list[Any]]]:
    """What each of them returned."""
    cases = [case(data, name, changes) for name, changes in RUNS.items()]
    arguments = (str(references[0]), hf_models.probe_ids(), str(data), cases)
    return run_ranks(load_and_train, 2, *arguments, timeout_s=500)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_slices(
    references: tuple[Path, dict[str, torch.Tensor]],
    two_ranks: list[tuple[dict[str, Any], list[Any]]],
    family: str,
    layout: str,
) -> None:
    ranks = [loaded[f"{family} {layout}"] for loaded, _ in two_ranks]
    last_stage = [logits for logits, _, _ in ranks if logits is not None]
    assert len(last_stage) == (1 if "pp2" in layout else 2)
    for logits in last_stage:
        assert (logits.log_softmax(-1) - references[1][family]).abs().max() < 1e-5
    for _, num_read, held in ranks:
        assert num_read == held  # every element of ours once, and no other


@pytest.mark.parametrize("name", RUNS)
def test_biases_and_head_norms_have_the_gradients_of_one_rank(
    one_rank: dict[str, Any], two_ranks: list[tuple[dict[str, Any], list[Any]]], name: str
) -> None:
    got = two_ranks[0][1][list(RUNS).index(name)]
    keys = one_rank["gradients"].keys()
    assert keys == got["gradients"].keys()
    for part in ("linear_qkv.bias", "q_layernorm.weight", "k_layernorm.weight"):
        assert any(part in key for key in keys)
    for key, gradient in one_rank["gradients"].items():
        largest = np.abs(gradient).max()
        assert largest > 0, key
        assert np.abs(got["gradients"][key] - gradient).max() < 1e-5 * largest, key
    for want, record in zip(one_rank["records"], got["records"], strict=True):
        assert record["loss"] == pytest.approx(want["loss"], rel=1e-5)
