"""Decoding on every layout: the same logits at every step, the same greedy and sampled tokens as on one rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nova_kernels.testing import run_ranks

LENGTHS = (
    5,
    1,
    17,
    3,
    22,
)  # an odd number of sequences: sequence parallelism pads a step, and a pack of 23 tokens
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {"one": {}, "one-kv": {}, "one-tied": {}},
    2: {
        "tp2": {"tensor": 2},
        "tp2-sp": {"tensor": 2, "sequence": True},
        "tp2-sp-kv": {"tensor": 2, "sequence": True},
        "pp2": {"pipeline": 2},
        "pp2-vpp2-kv": {"pipeline": 2, "virtual_pipeline": 2},
        "pp2-tied": {"pipeline": 2},
        "tp2-tied": {"tensor": 2},
        "dp2": {},
    },
    4: {
        "tp2-pp2-vpp2-sp-kv": {
            "tensor": 2,
            "pipeline": 2,
            "virtual_pipeline": 2,
            "sequence": True,
        },
        "tp2-dp2": {"tensor": 2},
    },
}


def run_layouts(rank: int, layouts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [run_layout(name, layout) for name, layout in layouts.items()]


def run_layout(name: str, layout: dict[str, Any]) -> dict[str, Any]:
    """Logits (steps, B, V) of forced tokens, empty on ranks without the last stage; greedy and sampled continuations."""
    from nova_sys.config import ModelConfig, ParallelConfig
    from nova_sys.decode import Decoder
    from nova_sys.generate import continue_all
    from nova_sys.model.build import build_model, transformer_config
    from nova_sys.parallel import parallel_run
    from nova_sys.sampling import Sampling

    shift = {"kv_shift": True, "kv_shift_init": "random"} if "kv" in name else {}
    tied = {"tied_embeddings": True, "norm_head": True} if "tied" in name else {}
    model = ModelConfig(
        num_layers=4, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, init_std=0.3,
        **shift, **tied,
    )  # fmt: skip
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 300, length).tolist() for length in LENGTHS]
    forced = torch.from_numpy(rng.integers(0, 300, (6, len(LENGTHS))))
    with parallel_run(ParallelConfig(**layout), seed=1) as parallel:
        torch.set_num_threads(1)
        config = transformer_config(model, parallel, dtype=torch.float32)
        chunks = build_model(model, config, parallel, vocab_size=300, max_positions=40, seed=5)
        for chunk in chunks:
            chunk.eval().requires_grad_(False)
        decoder = Decoder(chunks, parallel, pack_length=26, num_ids=300)
        logits = [decoder.prefill(prompts, 8), *(decoder.step(token_B) for token_B in forced)]
        options = {
            "greedy": Sampling(max_new_tokens=8),
            "sampled": Sampling(max_new_tokens=8, temperature=1, top_p=0.9, num_samples=3, seed=2),
        }
        found = {
            key: [
                (item, done.ids, done.finish_reason, done.logp)
                for item, done in continue_all(
                    decoder, prompts, set(range(0, 300, 15)), sampling, 130
                )
            ]
            for key, sampling in options.items()
        }
        return {"logits": [x for x in logits if x is not None], **found}


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    """By layout, what every rank returned."""
    found = {name: [run_layout(name, layout)] for name, layout in LAYOUTS[1].items()}
    for world_size in (2, 4):
        layouts = LAYOUTS[world_size]
        by_rank = run_ranks(run_layouts, world_size, layouts, timeout_s=600)
        found |= dict(zip(layouts, map(list, zip(*by_rank, strict=True)), strict=True))
    return found


@pytest.mark.parametrize("name", [name for n in (2, 4) for name in LAYOUTS[n]])
def test_layout_agrees_with_one_rank(results: dict[str, list[dict[str, Any]]], name: str) -> None:
    kind = next((f"one-{kind}" for kind in ("kv", "tied") if kind in name), "one")
    (expected,) = results[kind]
    assert len(expected["logits"]) == 7
    last_stage = [rank for rank in results[name] if rank["logits"]]
    assert len(last_stage) == len(results[name]) // (2 if "pp2" in name else 1)
    for rank in last_stage:
        for want, got in zip(expected["logits"], rank["logits"], strict=True):
            assert (got - want).abs().max() < 1e-5 * want.abs().max()
    for rank in results[name]:
        for key, count in (("greedy", 5), ("sampled", 15)):
            assert len(rank[key]) == count
            for want, got in zip(expected[key], rank[key], strict=True):
                assert got[:3] == want[:3]
                assert got[3] == pytest.approx(want[3], rel=1e-5)


def test_cases_differ(results: dict[str, list[dict[str, Any]]]) -> None:
    """The comparisons above have teeth: other models give other tokens, samples differ, and some answers stop early."""
    one, shift, tied = (results[name][0] for name in LAYOUTS[1])
    assert one["greedy"] != shift["greedy"] and one["greedy"] != tied["greedy"]
    assert len({tuple(ids) for _, ids, _, _ in one["sampled"]}) == 15
    assert {reason for _, _, reason, _ in one["sampled"]} == {"stop", "length"}
