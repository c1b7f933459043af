"""Packing and prefix sharing are exact in the whole model: log-probs and every parameter's gradient, in fp64."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from nova_kernels.testing import poison
from nova_sys import optimizer
from nova_sys.algo.dpo import DPO
from nova_sys.config import DataConfig, ModelConfig, ParallelConfig, RunConfig, RunSection
from nova_sys.data.batch import Pack, build_pack
from nova_sys.data.prepare import prepare_data
from nova_sys.data.token_store import TokenStore
from nova_sys.model.build import build_model, transformer_config
from nova_sys.model.gpt import PackedGPT
from nova_sys.parallel import Parallel, parallel_run
from nova_sys.step import train_step
from nova_sys.stopping import StopRequest

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
        {"kv_shift": True, "sliding_window": 4, "window_layers": (1,), "window_heads": 2},
    ],
    ids=["plain", "kv-shift", "tied-normhead", "kv-shift-windows"],
)
def test_sharing_and_packing_change_nothing(
    parallel: Parallel, store: TokenStore, changes: dict
) -> None:
    gpt = model_of(replace(MODEL, **changes), parallel, torch.float64)
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


def poison_padding(gpt: PackedGPT, num_tokens: int) -> None:
    """NaN in the padding rows of everything that an op sees which mixes tokens: queries, keys and values of every layer, and the
    hidden states of the output layer. Norms and projections treat each token alone (test_nan_stays_in_the_padding)."""

    def filled(x: torch.Tensor, value: float) -> torch.Tensor:
        row_T = torch.arange(x.size(0)).view(-1, *[1] * (x.dim() - 1))
        return torch.where(row_T < num_tokens, x, value)

    def with_nan(_: Any, args: tuple) -> tuple:
        is_activation = [isinstance(x, torch.Tensor) and x.is_floating_point() for x in args]
        return tuple(
            filled(x, math.nan) if wanted else x
            for x, wanted in zip(args, is_activation, strict=True)
        )

    layers: Any = gpt.decoder.layers
    for layer in layers:
        attention = layer.self_attention.core_attention
        attention.register_forward_pre_hook(with_nan)
        attention.register_forward_hook(lambda _, __, out: filled(out, 0.0))
    gpt.output_layer.register_forward_pre_hook(with_nan)


def model_of(
    model: ModelConfig, parallel: Parallel, dtype: torch.dtype, positions: int = PACK_LENGTH
) -> PackedGPT:
    config = transformer_config(model, parallel, dtype=dtype)
    (gpt,) = build_model(model, config, parallel, vocab_size=300, max_positions=positions, seed=5)
    return gpt


def test_nan_in_the_padding_changes_nothing(parallel: Parallel, store: TokenStore) -> None:
    """Log-probs and every gradient, bit for bit."""
    (pack,) = pack_groups(store, [[0, 1]], True)
    assert pack.num_tokens < PACK_LENGTH - 10
    logp, grads = outcome(model_of(MODEL, parallel, torch.float32), [pack])
    poisoned = model_of(MODEL, parallel, torch.float32)
    poison_padding(poisoned, pack.num_tokens)
    other_logp, other_grads = outcome(poisoned, [pack])
    assert np.array_equal(logp, other_logp)
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name


@torch.no_grad()
def test_nan_stays_in_the_padding(parallel: Parallel, store: TokenStore) -> None:
    """A token that is NaN from the embedding on, in the padding: no other token sees it, in any layer."""
    gpt = model_of(replace(MODEL, kv_shift=True, kv_shift_init="random"), parallel, torch.float32)
    (pack,) = pack_groups(store, [[0, 1]], True)
    assert 77 not in pack.tokens_T
    logp_R = gpt(pack.to("cpu"))
    gpt.embedding.word_embeddings.weight[77] = math.nan
    tokens_T = pack.tokens_T.copy()
    tokens_T[pack.num_tokens :] = 77
    seen: list[torch.Tensor] = []

    def look(_: Any, __: Any, hidden: Any) -> None:
        seen.append(hidden)

    gpt.decoder.register_forward_hook(look)
    assert torch.equal(gpt(replace(pack, tokens_T=tokens_T).to("cpu")), logp_R)
    assert seen[0][pack.num_tokens :].isnan().all(), "the poison was there"


def test_scratch_that_is_read_before_it_is_written_would_show(
    parallel: Parallel, store: TokenStore
) -> None:
    gpt = model_of(MODEL, parallel, torch.float32)
    packs = pack_groups(store, [[0, 1, 2], []], True)
    logp, grads = outcome(gpt, packs)
    with poison():
        other_logp, other_grads = outcome(gpt, packs)
    assert np.array_equal(logp, other_logp)
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_every_pair_weighs_the_same(parallel: Parallel, store: TokenStore, loss: str) -> None:
    """A pack with one pair and a pack with eight: the step's gradient is the mean over the nine pairs, one computed at a time."""
    ddp_config = optimizer.DistributedDataParallelConfig
    wide = {"grad_reduce_in_fp32": False}
    with mock.patch.object(
        optimizer, "DistributedDataParallelConfig", lambda **settings: ddp_config(**{**settings, **wide})
    ):  # fmt: skip
        config = transformer_config(MODEL, parallel, dtype=torch.float64)
        chunks = build_model(MODEL, config, parallel, vocab_size=300, max_positions=512, seed=5)
        ddp = optimizer.wrap_for_training(chunks, config, parallel, distributed_optimizer=False)
    algorithm = DPO(beta=0.7, loss=loss)
    ref_logp = -40.0 - 10.0 * np.cos(np.arange(store.num_responses))
    documents = list(range(store.num_documents))

    def packs_of(groups: list[list[int]], share_prefix: bool) -> list[Pack]:
        return [
            build_pack(store, group, 512, share_prefix=share_prefix, ref_logp=ref_logp)
            for group in groups
        ]

    packs = packs_of([documents[:1], documents[1:]], True)
    result = train_step(ddp, NoUpdate(), packs, algorithm, parallel, StopRequest())
    parameters: dict[str, Any] = dict(chunks[0].named_parameters())
    seen = {name: parameter.main_grad.clone() for name, parameter in parameters.items()}

    alone = model_of(MODEL, parallel, torch.float64, positions=512)
    of_pairs: list[dict[str, torch.Tensor]] = []
    losses = []
    for pack in packs_of([[d] for d in documents], False):
        alone.zero_grad()
        out = algorithm.loss(alone(pack.to("cpu")), pack.to("cpu"))
        out.loss_sum.backward()
        losses.append(out.loss_sum.item())
        of_pairs.append({n: p.grad.clone() for n, p in alone.named_parameters() if p.grad is not None})  # fmt: skip
    assert result.count == 9 and result.means["loss"] == pytest.approx(np.mean(losses), rel=1e-10)
    per_pack_mean_differs = False
    for name, grad in seen.items():
        single, *others = (grads[name] for grads in of_pairs)
        expected = (single + sum(others)) / 9
        # the count is divided by in fp32 once, the same for all elements
        torch.testing.assert_close(grad, expected, rtol=2e-7, atol=1e-12, msg=name)
        scale = (grad * expected).sum() / (expected * expected).sum()
        torch.testing.assert_close(grad, scale * expected, rtol=1e-9, atol=1e-12, msg=name)
        mean_of_means = (single + sum(others) / 8) / 2
        per_pack_mean_differs |= bool((mean_of_means - expected).abs().max() > 0.1 * expected.abs().max())  # fmt: skip
    assert per_pack_mean_differs, "else this test could not tell the two apart"


class NoUpdate:
    """In the place of the optimizer: leaves the gradients as they are."""

    def zero_grad(self) -> None: ...
    def step(self) -> tuple[bool, float, None]:
        return True, 0.0, None


def test_padding_content_changes_nothing(parallel: Parallel, store: TokenStore) -> None:
    gpt = model_of(MODEL, parallel, torch.float32)
    (pack,) = pack_groups(store, [[0, 1]], True)
    tokens_T = pack.tokens_T.copy()
    tokens_T[pack.num_tokens :] = 77
    logp, grads = outcome(gpt, [pack])
    other_logp, other_grads = outcome(gpt, [replace(pack, tokens_T=tokens_T)])
    assert np.array_equal(logp, other_logp)
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name
