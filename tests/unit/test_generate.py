"""Decoding with the cache equals the full forward pass; sampling follows its distribution; mistakes are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from nova_kernels.segments import segment_index
from nova_kernels.testing import poison, seeded_normal
from nova_sys.config import ModelConfig, ParallelConfig
from nova_sys.decode import Decoder, continue_prompts
from nova_sys.generate import Completion, plan_batches, text_behind
from nova_sys.model.attention import PackLayout
from nova_sys.model.build import build_model, transformer_config
from nova_sys.model.cache import decode_attention
from nova_sys.model.gpt import PackedGPT
from nova_sys.parallel import Parallel, parallel_run
from nova_sys.sampling import Sampling, choose_tokens, nucleus, uniforms

PACK_LENGTH = 48
VOCAB = 300
MODEL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    ffn_hidden_size=48,
    init_std=0.3,  # spreads the logits: a wrong cache then shows in the tokens, too
)
KV_SHIFT = {"kv_shift": True, "kv_shift_init": "random"}
MODELS = {
    "grouped": {},
    "ungrouped": {"num_kv_heads": 4},
    "kv-shift": KV_SHIFT,
    "kv-shift-one-kv-head": {**KV_SHIFT, "num_kv_heads": 1},
    "tied-normhead": {"tied_embeddings": True, "norm_head": True},
    "windows": {"sliding_window": 9, "window_layers": (1,)},
    "windows-other-heads": {
        **KV_SHIFT,
        "sliding_window": 5,
        "window_layers": (0,),
        "window_heads": 2,
        "window_kv_heads": 1,
    },
}
LENGTHS = (7, 1, 20, 2, 33, 12)  # several prefill packs, prompts of one token among them


@pytest.fixture(scope="module")
def parallel() -> Iterator[Parallel]:
    with parallel_run(ParallelConfig(), seed=1) as joined:
        torch.set_num_threads(1)  # the tensors are tiny, and the machine may be busy
        yield joined


def build(parallel: Parallel, changes: dict, dtype: torch.dtype = torch.float32) -> PackedGPT:
    model = replace(MODEL, **changes)
    config = transformer_config(model, parallel, dtype=dtype)
    (gpt,) = build_model(
        model, config, parallel, vocab_size=VOCAB, max_positions=PACK_LENGTH, seed=5
    )
    return gpt.eval().requires_grad_(False)


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


def full_logits(gpt: PackedGPT, ids: list[int]) -> torch.Tensor:
    """Logits behind every token of one sequence, by one forward pass without a cache: (len(ids), V)."""
    T = len(ids)
    segments = torch.tensor([[0, T, 0, 0]], dtype=torch.int32)
    layout = PackLayout(segments, segment_index(segments, T))
    return gpt.run(torch.tensor(ids), layout, torch.arange(T), None)


def assert_equal_to(expected: torch.Tensor, got: torch.Tensor, rtol: float) -> None:
    """Relative to the largest logit of the row."""
    error = (got - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() < rtol, error


@pytest.mark.parametrize(
    ("name", "dtype", "rtol"),
    [
        *((name, torch.float32, 1e-5) for name in MODELS),
        ("kv-shift", torch.float64, 2e-7),  # the output layer rounds logits to fp32
    ],
)
def test_every_step_equals_the_full_forward(
    parallel: Parallel, name: str, dtype: torch.dtype, rtol: float
) -> None:
    """Forced tokens, step by step; sequences are copied, reordered and dropped on the way."""
    gpt = build(parallel, MODELS[name], dtype)
    prompts = prompts_of(LENGTHS)
    decoder = Decoder([gpt], parallel, pack_length=PACK_LENGTH, num_ids=VOCAB)
    with poison():
        logits = decoder.prefill(prompts, 12)
        assert logits is not None
        rows = [5, 0, 1, 1, 4, 2, 3]
        decoder.select(rows)
        sequences, logits = [list(prompts[row]) for row in rows], logits[rows]
        rng = np.random.default_rng(4)
        for step in range(11):
            expected = torch.stack([full_logits(gpt, ids)[-1] for ids in sequences])
            assert_equal_to(expected, logits, rtol)
            if step == 5:
                kept = [6, 0, 3, 4]
                decoder.select(kept)
                sequences = [sequences[place] for place in kept]
            new = rng.integers(0, VOCAB, len(sequences)).tolist()
            sequences = [[*ids, token] for ids, token in zip(sequences, new, strict=True)]
            logits = decoder.step(torch.tensor(new))
            assert logits is not None


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_the_full_forward(parallel: Parallel, name: str) -> None:
    """And so are their log-probs; sequences stop at different steps, and finished ones leave the batch."""
    gpt = build(parallel, MODELS[name])
    prompts, stops = prompts_of(LENGTHS), set(range(0, VOCAB, 14))
    decoder = Decoder([gpt], parallel, pack_length=PACK_LENGTH, num_ids=VOCAB)
    rows = list(range(len(prompts)))
    done = continue_prompts(decoder, prompts, rows, None, stops, Sampling(max_new_tokens=15))
    for prompt, continuation in zip(prompts, done, strict=True):
        ids, logp = list(prompt), 0.0
        for _ in range(15):
            logp_V = full_logits(gpt, ids)[-1].log_softmax(-1)
            ids.append(int(logp_V.argmax()))
            logp += float(logp_V[ids[-1]])
            if ids[-1] in stops:
                break
        assert continuation.ids == ids[len(prompt) :]
        assert continuation.logp == pytest.approx(logp, rel=1e-5)
        assert continuation.finish_reason == ("stop" if ids[-1] in stops else "length")
    assert len({len(c.ids) for c in done}) > 2
    assert {c.finish_reason for c in done} == {"stop", "length"}


def test_a_wrong_cache_is_seen(parallel: Parallel) -> None:
    """The comparisons above have teeth: without the last raw key, or with a key too few, the logits differ."""
    gpt = build(parallel, MODELS["kv-shift"])
    prompts = prompts_of((7, 5))
    decoder = Decoder([gpt], parallel, pack_length=PACK_LENGTH, num_ids=VOCAB)

    def step_after(spoil) -> torch.Tensor:
        decoder.prefill(prompts, 4)
        spoil(decoder._cache.layers[1])
        logits = decoder.step(torch.tensor([11, 12]))
        assert logits is not None
        return logits

    right = step_after(lambda layer: None)
    for spoil in (
        lambda layer: layer.last_key_BKH.zero_(),
        lambda layer: layer.last_value_BKH.zero_(),
        lambda layer: layer.key_BKLH[:, :, 0].zero_(),
    ):
        assert (step_after(spoil) - right).abs().max() > 1e-3


def test_decode_attention_equals_its_definition() -> None:
    B, N, K, L, H = 5, 6, 2, 9, 8
    q_BNH = seeded_normal(B, N, H, seed=1)
    key_BKLH, value_BKLH = (seeded_normal(B, K, L + 3, H, seed=s)[:, :, :L] for s in (2, 3))
    length_B = torch.tensor([1, 9, 4, 2, 7])
    got = decode_attention(q_BNH, key_BKLH, value_BKLH, length_B)
    for b in range(B):
        for n in range(N):
            key, value = (
                x[b, n // (N // K), : length_B[b]].double() for x in (key_BKLH, value_BKLH)
            )
            p = (key @ q_BNH[b, n].double() * H**-0.5).softmax(0)
            torch.testing.assert_close(got[b, n].double(), p @ value, rtol=1e-5, atol=1e-6)


def test_samples_do_not_depend_on_the_batch(parallel: Parallel) -> None:
    gpt = build(parallel, KV_SHIFT)
    prompts, stops = prompts_of(LENGTHS), set(range(0, VOCAB, 12))  # so that some leave the batch
    sampling = Sampling(max_new_tokens=10, temperature=0.8, top_p=0.9, seed=7, num_samples=3)
    decoder = Decoder([gpt], parallel, pack_length=PACK_LENGTH, num_ids=VOCAB)

    def sampled(batch_tokens: int, options: Sampling = sampling) -> dict:
        found = {}
        batches = plan_batches([len(p) for p in prompts], options, batch_tokens, data_size=1)
        for items in batches:
            rows = [prompt for prompt, _ in items]
            done = continue_prompts(
                decoder, prompts, rows, uniforms(options, items), stops, options
            )
            found |= dict(zip(items, (c.ids for c in done), strict=True))
        return found

    together = sampled(10_000)
    assert sampled(50) == together and len(together) == 18
    assert len({tuple(ids) for ids in together.values()}) > 15
    assert sampled(10_000, replace(sampling, seed=8)) != together
    longer = sampled(10_000, replace(sampling, max_new_tokens=13))
    assert all(longer[item][: len(ids)] == ids for item, ids in together.items())
    assert len({len(ids) for ids in together.values()}) > 2


def test_rows_without_a_token_are_never_chosen(parallel: Parallel) -> None:
    """A vocabulary may have more rows than the tokenizer has ids; the log-prob still counts them."""
    decoder = Decoder([build(parallel, {})], parallel, pack_length=PACK_LENGTH, num_ids=4)
    (few,) = continue_prompts(decoder, [[1, 2]], [0], None, set(), Sampling(max_new_tokens=9))
    assert max(few.ids) < 4
    logits = full_logits(build(parallel, {}), [1, 2])[-1]
    (first,) = continue_prompts(decoder, [[1, 2]], [0], None, set(), Sampling(max_new_tokens=1))
    assert int(logits.argmax()) >= 4 and first.ids == [int(logits[:4].argmax())]
    assert first.logp == pytest.approx(float(logits.log_softmax(0)[first.ids[0]]), rel=1e-5)


def chi_square(counts: np.ndarray, p: np.ndarray) -> float:
    expected = p * counts.sum()
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    return float(((counts - expected)[possible] ** 2 / expected[possible]).sum())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (2.5, 0.95)])
def test_draws_follow_the_distribution(temperature: float, top_p: float) -> None:
    """Pearson's chi-square with 12 tokens: a right sampler exceeds 35 about once in 4,000 times; the seed is fixed."""
    logits_V = seeded_normal(12, seed=2) * 1.5
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=50, seed=3)
    uniform = uniforms(sampling, [(i, 0) for i in range(400)]).flatten()
    token_R = choose_tokens(logits_V.expand(len(uniform), -1), uniform, sampling)
    p = (logits_V.double() / temperature).softmax(0).numpy()
    best = np.argsort(-p)
    size = int(np.searchsorted(np.cumsum(p[best]), top_p)) + 1 if top_p < 1 else len(p)
    p[best[size:]] = 0  # the smallest set with at least top_p
    assert size > 2 and (top_p == 1 or size < 12)
    counts = np.bincount(token_R.numpy(), minlength=12)
    assert chi_square(counts, p / p.sum()) < 35
    tilted = p * np.where(np.arange(12) % 2, 0.95, 1.05)
    assert chi_square(counts, tilted / tilted.sum()) > 35  # a little wrong is seen


def test_nucleus() -> None:
    p = torch.tensor([[0.1, 0.4, 0.2, 0.2, 0.1], [0.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    for top_p, first, second in (
        (0.3, [1], [1]),
        (0.4, [1], [1]),
        (0.5, [1, 2], [1]),  # of equals the lower id
        (0.75, [1, 2, 3], [1]),
        (0.85, [0, 1, 2, 3], [1]),
    ):
        kept = nucleus(p, top_p)
        assert [row.nonzero().flatten().tolist() for row in kept] == [first, second], top_p


def test_extreme_draws() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 3.0, -torch.inf]])
    one = Sampling(temperature=1)
    for number, token in ((0.0, 1), (1 - 2**-53, 2)):  # never a token without probability
        uniform = torch.tensor([number], dtype=torch.float64)
        assert choose_tokens(logits, uniform, one).tolist() == [token]
    cold = Sampling(temperature=1e-300)
    assert choose_tokens(logits * 1e30, torch.tensor([0.5]).double(), cold).tolist() == [2]
    assert choose_tokens(torch.tensor([[1.0, 5.0, 5.0]]), None, Sampling()).tolist() == [1]


def test_logits_that_are_not_finite_are_refused(parallel: Parallel) -> None:
    gpt = build(parallel, {})
    gpt.output_layer.weight[3] = torch.nan
    decoder = Decoder([gpt], parallel, pack_length=PACK_LENGTH, num_ids=VOCAB)
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, max_new_tokens=2)
        uniform = uniforms(sampling, [(0, 0)]) if temperature else None
        with pytest.raises(ValueError, match="not finite"):
            continue_prompts(decoder, [[1, 2]], [0], uniform, set(), sampling)


def test_batches_keep_the_order_and_the_budget() -> None:
    sampling = Sampling(max_new_tokens=10, temperature=1, num_samples=2)
    lengths = [5, 30, 1, 1, 90, 2]
    items = [(p, s) for p in range(6) for s in range(2)]
    for budget, data_size in ((10**6, 1), (10**6, 5), (80, 1), (120, 3), (1, 1)):
        batches = plan_batches(lengths, sampling, budget, data_size)
        assert [item for batch in batches for item in batch] == items
        assert max(map(len, batches)) <= -(-len(items) // data_size)
        for batch in batches:
            cached = len(batch) * max(lengths[p] + 10 for p, _ in batch)
            assert cached <= budget or len(batch) == 1
    assert len(plan_batches(lengths, sampling, 10**6, 1)) == 1
    assert max(map(len, plan_batches([1] * 999, Sampling(), 10**6, 1))) == 256


class Pieces:
    """Decodes as Llama 2's tokenizer does: the space before a text's first word is not part of the text."""

    words = ("", "Once", "upon", "a", "time")

    def decode(self, ids: list[int]) -> str:
        return "".join(f" {self.words[i]}" for i in ids).removeprefix(" ")


def test_the_text_of_a_continuation() -> None:
    assert text_behind([1, 2], [3, 4], Pieces()) == " a time"  # type: ignore[arg-type]
    texts = {"index": 0, "sample": 0, "text": " a time", "finish_reason": "stop", "logp": -1.5}
    told = Completion(prompt="Once upon", prompt_ids=[1, 2], ids=[3, 4, 0], **texts)
    assert told.as_text() == "Once upon a time"
    turns = [{"role": "user", "content": "tell \u4e2d"}]
    answer = replace(told, prompt=turns)
    assert answer.as_text() == " a time"
    record = json.loads(answer.as_json(with_ids=False))
    assert record == {
        "index": 0,
        "sample": 0,
        "prompt": turns,
        "completion": " a time",
        "finish_reason": "stop",
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "logp": -1.5,
    }
    with_ids = json.loads(answer.as_json(with_ids=True))
    assert with_ids == {**record, "prompt_ids": [1, 2], "completion_ids": [3, 4, 0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"temperature = -0.5: must be 0 \(greedy\) or more"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"temperature": 1, "top_p": 0.0}, "top_p = 0.0: must be above 0"),
        ({"temperature": 1, "top_p": 1.5}, "top_p = 1.5"),
        ({"top_p": 0.9}, "top_p = 0.9: has no effect at temperature 0"),
        ({"num_samples": 4}, "num_samples = 4: at temperature 0 all samples"),
        ({"num_samples": 0}, "num_samples = 0: must be 1 or more"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be 1 or more"),
        ({"seed": -1}, "seed = -1: must be 0 or more"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
