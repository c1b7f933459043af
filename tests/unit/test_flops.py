"""The count of operations behind MFU, against counts made one product at a time, and against what torch sees of a model's step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nova_kernels.packed_attention.reference import attention_mask
from nova_sys.config import ModelConfig, ParallelConfig
from nova_sys.data.batch import Pack
from nova_sys.flops import attention_pairs, training_flops
from nova_sys.model.build import build_model, transformer_config
from nova_sys.parallel import Parallel, parallel_run

Segment = tuple[int, int, int, int]
# A prompt of 3 tokens with the answer of 2 behind it and two branches, a document without branches, 6 tokens of padding.
SEGMENTS: list[Segment] = [(0, 5, 0, 0), (5, 9, 0, 3), (9, 11, 0, 3), (11, 15, 11, 11)]
PADDING: list[Segment] = [(15, 19, 15, 15), (19, 21, 19, 19)]


def make_pack(segments: Sequence[Segment], padding: Sequence[Segment], num_rows: int) -> Pack:
    none = np.zeros(0)
    num_tokens = segments[-1][1]
    length = [*segments, *padding][-1][1]
    return Pack(
        tokens_T=np.arange(length) % 7,
        segments_S4=np.array([*segments, *padding], np.int32),
        row_R=np.arange(num_rows) % num_tokens,
        target_R=np.arange(num_rows) % 7,
        sequence_R=np.zeros(num_rows, np.int64),
        response_B=none,
        document_P=none,
        ref_logp_B=none,
        num_tokens=num_tokens,
        num_loss_tokens=num_rows,
    )


def keys_of(token: int, segments: Sequence[Segment], window: int) -> list[int]:
    """What a token attends to, in the order of positions: its prefix, its segment up to itself; of that the last `window`."""
    for start, end, prefix_start, prefix_end in segments:
        if start <= token < end:
            seen = [*range(prefix_start, prefix_end), *range(start, token + 1)]
            return seen[-window:] if window else seen
    raise AssertionError(token)


def count_by_hand(
    model: ModelConfig, segments: Sequence[Segment], num_rows: int, vocab_size: int
) -> int:
    """Every product of a row of numbers with a column costs a multiplication and an addition per number."""
    width = model.hidden_size
    forward = 0
    for layer in range(model.num_layers):
        heads, kv_heads, dim, window = model.heads_of(layer)
        matrices = [
            (width, heads * dim),  # queries
            (width, kv_heads * dim),  # keys
            (width, kv_heads * dim),  # values
            (heads * dim, width),  # output
            (width, model.ffn_hidden_size),  # gate
            (width, model.ffn_hidden_size),  # up
            (model.ffn_hidden_size, width),  # down
        ]
        for token in range(segments[-1][1]):
            for inputs, outputs in matrices:
                forward += outputs * 2 * inputs
            for _ in keys_of(token, segments, window):
                forward += heads * 2 * dim  # its score: query times key
                forward += heads * 2 * dim  # its share of the output: probability times value
    for _ in range(num_rows):
        forward += vocab_size * 2 * width
    return 3 * forward  # backward: as much for the gradient of each factor


@pytest.mark.parametrize(
    "model",
    [
        ModelConfig(num_layers=3, hidden_size=16, num_heads=4, num_kv_heads=2, ffn_hidden_size=40),
        ModelConfig(
            num_layers=2,
            hidden_size=16,
            num_heads=4,
            num_kv_heads=4,
            head_dim=6,
            ffn_hidden_size=24,
            sliding_window=3,
        ),
        ModelConfig(
            num_layers=5,
            hidden_size=16,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=24,
            sliding_window=4,
            window_layers=(1, 3),
            window_heads=2,
            window_kv_heads=1,
        ),
    ],
    ids=["all alike", "window", "some layers with a window and other heads"],
)
def test_a_packs_operations_one_by_one(model: ModelConfig) -> None:
    pack = make_pack(SEGMENTS, PADDING, num_rows=8)
    by_hand = count_by_hand(model, SEGMENTS, num_rows=8, vocab_size=100)
    assert training_flops(model, 100, pack) == by_hand


@pytest.mark.parametrize("window", [0, 1, 2, 3, 4, 5, 6, 7, 8, 21, 1000])
def test_pairs_are_those_that_the_mask_allows(window: int) -> None:
    segments = [*SEGMENTS, *PADDING]
    segments_S4 = np.array(segments, np.int32)
    one_by_one = sum(len(keys_of(token, segments, window)) for token in range(21))
    assert attention_pairs(segments_S4, window) == one_by_one
    assert one_by_one == attention_mask(torch.from_numpy(segments_S4), 21, window).sum()


def test_pairs_of_long_packs_do_not_overflow() -> None:
    length = 3_000_000
    segments_S4 = np.array([(0, length, 0, 0)], np.int32)
    assert attention_pairs(segments_S4) == length * (length + 1) // 2
    assert attention_pairs(segments_S4, 2) == 2 * length - 1


def test_an_empty_pack_needs_nothing() -> None:
    model = ModelConfig()
    padding = make_pack([(0, 0, 0, 0)], [(0, 128, 0, 0)], num_rows=0)
    assert training_flops(model, 100, padding) == 0


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    with parallel_run(ParallelConfig(), seed=1) as joined:
        yield joined


def test_torch_counts_the_same_in_a_models_step(parallel: Parallel) -> None:
    """Segments of one token, so that the reference's attention computes nothing that is masked; a vocabulary without padding."""
    model = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=2,
        ffn_hidden_size=48,
        vocab_size=256,
        kv_shift=True,
    )
    segments = [
        segment
        for t in range(0, 12, 3)
        for segment in [(t, t + 1, t, t), (t + 1, t + 2, t, t + 1), (t + 2, t + 3, t, t + 1)]
    ]
    pack = make_pack(segments, [], num_rows=5)
    config = transformer_config(model, parallel, dtype=torch.float32)
    (gpt,) = build_model(model, config, parallel, vocab_size=256, max_positions=12, seed=1)
    in_place = {
        torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]
    }  # torch's table lacks it
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        gpt(pack.to("cpu")).sum().backward()
    by_operator = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = 3 * 2 * 2 * 2 * 4 * 8 * (4 * 1 + 8 * 2)  # layers, heads, head dim, pairs
    assert by_operator["aten.bmm"] == attention
    assert training_flops(model, 256, pack) == counter.get_total_flops()
