"""docs/memory.md shows what nova_sys/memory.py computes; a dry run tells it of any recipe. Against runs: tests/distributed/test_memory.py."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from nova_sys.config import RunConfig
from nova_sys.config_io import check, config_from
from nova_sys.memory import GIB, Memory, chunks_in_flight, fullest_rank, recompute_block

ROOT = Path(__file__).parents[2]
LLAMA_3_8B = """num_layers=32 hidden_size=4096 num_heads=32 num_kv_heads=8 ffn_hidden_size=14336 vocab_size=128256
rope_base=500000.0 norm_eps=1e-5"""
RUN = "data.train=x data.pack_length=8192 train.global_batch_packs=16 train.precision=bf16"
TP8 = "parallel.tensor=8 parallel.sequence=true"
TP4, TP2 = TP8.replace("8", "4"), TP8.replace("8", "2")
FULL, SELECTIVE = "train.recompute=full", "train.recompute=selective"
LAYOUTS = [  # GPUs, layout, settings
    (1, "one GPU, full recomputation", FULL),
    (2, "TP2, full recomputation", f"{TP2} {FULL}"),
    (2, "the same, `algo.reference = \"host\"`", f"{TP2} {FULL} algo.reference=host"),
    (2, "the same, `algo.reference = \"online\"`", f"{TP2} {FULL} algo.reference=online"),
    (4, "TP4", TP4),
    (4, "TP4, online reference", f"{TP4} algo.reference=online"),
    (4, "TP2, DP2, full recomputation", f"{TP2} {FULL}"),
    (4, "TP2, PP2, selective recomputation", f"{TP2} parallel.pipeline=2 {SELECTIVE}"),
    (8, "TP8", TP8),
    (8, "TP4, DP2", TP4),
    (8, "TP2, DP4, full recomputation", f"{TP2} {FULL}"),
    (8, "TP2, PP2, DP2", f"{TP2} parallel.pipeline=2"),
    (8, "DP8, full recomputation", FULL),
]  # fmt: skip
FITS_GIB = 72.0
"""Of the 79 GiB that an H100 of 80 GB has, what is left to the parts of the table."""


def run_of(settings: str) -> RunConfig:
    model = [f"model.{setting}" for setting in LLAMA_3_8B.split()]
    return config_from([*model, *RUN.split(), *settings.split()], "-")


def table() -> str:
    names = [part.name for part in fields(Memory)]
    lines = [
        f"| GPUs | layout | {' | '.join(names)} | GiB per GPU | fits into 80 GB |",
        "|---" * (len(names) + 4) + "|",
    ]
    for gpus, layout, settings in LAYOUTS:
        config = run_of(settings)
        check(config, gpus)
        memory = fullest_rank(config, config.model.vocab_size, gpus)
        parts = " | ".join(f"{getattr(memory, name) / GIB:.1f}" for name in names)
        total = memory.total / GIB
        fits = "yes" if total <= FITS_GIB else "no"
        lines.append(f"| {gpus} | {layout} | {parts} | {total:.1f} | {fits} |")
    return "\n".join(lines)


def test_the_table_in_the_docs_is_the_formula() -> None:
    assert table() in (ROOT / "docs" / "memory.md").read_text(), f"\n{table()}\n"


def test_states_of_one_gpu_by_hand() -> None:
    """8.03 billion parameters: 2 bytes each, 4 of a gradient, 12 of an optimizer's state."""
    config = run_of("algo.reference=online")
    memory = fullest_rank(config, config.model.vocab_size, 1)
    assert memory.weights / 2 == memory.gradients / 4 == memory.optimizer / 12 == 8_030_261_248
    assert memory.reference == memory.weights
    sharded = fullest_rank(run_of(""), config.model.vocab_size, 4)
    assert (sharded.optimizer, sharded.gradients) == (memory.optimizer // 4, memory.gradients)
    assert sharded.reference == 0
    plain = fullest_rank(run_of("parallel.distributed_optimizer=false"), 128256, 4)
    assert plain.optimizer == memory.optimizer


@pytest.mark.parametrize(
    ("layers", "pipeline", "expected"), [(32, 1, 4), (32, 2, 4), (28, 1, 4), (8, 1, 2), (13, 1, 1), (4, 4, 1)]
)  # fmt: skip
def test_recomputed_blocks_divide_the_layers(layers: int, pipeline: int, expected: int) -> None:
    """Megatron asks for a layer that is not there when they do not."""
    settings = [f"model.num_layers={layers}", f"parallel.pipeline={pipeline}", FULL]
    assert recompute_block(config_from([*settings, "data.train=x"], "-")) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ("parallel.pipeline=4", [4, 3, 2, 1]),
        ("parallel.pipeline=4 train.global_batch_packs=2", [2, 2, 2, 1]),
        ("parallel.pipeline=2 parallel.virtual_pipeline=2", [5, 3]),
    ],
)
def test_chunks_in_flight(settings: str, expected: list[int]) -> None:
    """1F1B: a stage has as many packs in flight as stages from it to the end; interleaved, Megatron's warm-up and one."""
    config, stages = run_of(settings), len(expected)
    assert [chunks_in_flight(config, stages, stage) for stage in range(stages)] == expected
