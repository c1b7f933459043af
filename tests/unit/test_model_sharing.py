"""Packing and prefix sharing are exact in the whole model: log-probs and every parameter's gradient, in fp64."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from nova_sys.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, RunSection
from nova_sys.data.batch import Pack, build_pack
from nova_sys.data.prepare import prepare_data
from nova_sys.data.token_store import TokenStore
from nova_sys.model.build import build_model, transformer_config
from nova_sys.model.gpt import PackedGPT
from nova_sys.parallel import Parallel, parallel_run

PACK_LENGTH = 160
MODEL = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=48, vocab_size=300
)


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    with parallel_run(ParallelConfig(), seed=1) as joined:
        yield joined


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("pairs")
    rng = random.Random(3)

    def words(low: int, high: int) -> str:
        return "".join(" " + rng.choice("abcdef") for _ in range(rng.randint(low, high)))

    pairs = [
        {"prompt": "Q" + words(0, 12), "chosen": words(1, 9), "rejected": words(10, 14)}
        for _ in range(9)
    ]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = RunConfig(
        run=RunSection(dir=str(folder / "run")),
        model=MODEL,
        data=DataConfig(train=str(path), pack_length=PACK_LENGTH),
    )
    return prepare_data(config).store


def outcome(gpt: PackedGPT, packs: list[Pack]) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Log-probs by response id, and the gradients of a loss that weighs every response differently."""
    gpt.zero_grad()
    logp_by_response: dict[int, float] = {}
    for pack in packs:
        logp_R = gpt(pack.to("cpu"))
        logp_B = logp_R.new_zeros(len(pack.response_B)).index_add(
            0, torch.from_numpy(pack.sequence_R), logp_R
        )
        weight_B = torch.from_numpy(np.cos(1.0 + pack.response_B))
        (logp_B * weight_B).sum().backward()
        logp_by_response |= dict(zip(pack.response_B.tolist(), logp_B.tolist(), strict=True))
    ordered = np.array([logp_by_response[i] for i in range(len(logp_by_response))])
    return ordered, {n: p.grad.clone() for n, p in gpt.named_parameters() if p.grad is not None}


def pack_groups(store: TokenStore, groups: list[list[int]], share_prefix: bool) -> list[Pack]:
    return [build_pack(store, g, PACK_LENGTH, share_prefix=share_prefix) for g in groups]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_shift": True, "kv_shift_init": "random"},
        {"tied_embeddings": True, "norm_head": True},
    ],
    ids=["plain", "kv-shift", "tied-normhead"],
)
def test_sharing_and_packing_change_nothing(
    parallel: Parallel, store: TokenStore, changes: dict
) -> None:
    model = replace(MODEL, **changes)
    config = transformer_config(model, parallel, dtype=torch.float64)
    (gpt,) = build_model(model, config, parallel, vocab_size=300, max_positions=PACK_LENGTH, seed=5)
    documents = list(range(store.num_documents))
    alone_logp, alone_grads = outcome(gpt, pack_groups(store, [[d] for d in documents], False))
    assert set(alone_grads) == {name for name, _ in gpt.named_parameters()}
    assert all(grad.abs().max() > 1e-9 for grad in alone_grads.values())
    together = [documents[:3], documents[3:6], documents[6:]]
    for packs in (pack_groups(store, together, True), pack_groups(store, [*together, []], True)):
        logp, grads = outcome(gpt, packs)
        np.testing.assert_allclose(logp, alone_logp, rtol=1e-10)
        for name, grad in alone_grads.items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=1e-11, msg=name)


def test_padding_content_changes_nothing(parallel: Parallel, store: TokenStore) -> None:
    config = transformer_config(MODEL, parallel, dtype=torch.float32)
    (gpt,) = build_model(MODEL, config, parallel, vocab_size=300, max_positions=PACK_LENGTH, seed=5)
    (pack,) = pack_groups(store, [[0, 1]], True)
    tokens_T = pack.tokens_T.copy()
    tokens_T[pack.num_tokens :] = 77
    logp, grads = outcome(gpt, [pack])
    other_logp, other_grads = outcome(gpt, [replace(pack, tokens_T=tokens_T)])
    assert np.array_equal(logp, other_logp)
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name
