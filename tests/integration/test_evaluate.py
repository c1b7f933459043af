"""`nova evaluate`: its per-pair file against the model run one sequence at a time, on every layout, and joined to its input."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nova_kernels.testing import run_ranks
from nova_sys import evaluate
from nova_sys.config import (
    AlgoConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    RunSection,
    TrainConfig,
)
from nova_sys.errors import ToldStop, is_user_error
from nova_sys.evaluate import Estimate, evaluate_pairs, summary_text
from nova_sys.outputs import whole_file
from nova_sys.parallel import parallel_run

ROOT = Path(__file__).parents[2]
NATS = 1e-4


def train(folder: Path, config: RunConfig) -> Path:
    from nova_sys.trainer import Trainer

    with parallel_run(ParallelConfig(), seed=1) as parallel:
        Trainer(replace(config, run=RunSection(dir=str(folder))), parallel).train()
    return folder


def pair_lines(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return "".join(" " + rng.choice("abcdef") * rng.randint(1, 3) for _ in range(rng.randint(low, high)))  # fmt: skip

    return [
        json.dumps({"prompt": "Q" + words(0, 20), "chosen": words(1, 9), "rejected": words(10, 14)})
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """41 pairs: an odd number, and more than one pack."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(line + "\n" for line in pair_lines(41, seed=3)))
    return path


@pytest.fixture(scope="module")
def config(pairs: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_heads=4,
            num_kv_heads=2,
            ffn_hidden_size=48,
            vocab_size=280,
            kv_shift=True,
            kv_shift_init="random",
            init_std=0.2,
        ),
        data=DataConfig(train=str(pairs), pack_length=256, max_length=128),
        algo=AlgoConfig(name="sft"),
        train=TrainConfig(steps=3, global_batch_packs=2),
        optimizer=OptimizerConfig(lr=1e-2),
        checkpoint=CheckpointConfig(asynchronous=False),
        log=LogConfig(tensorboard=False, progress=False),
    )


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> Path:
    return train(tmp_path_factory.mktemp("sft") / "run", config)


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory, config: RunConfig, sft: Path) -> Path:
    later = replace(
        config, algo=AlgoConfig(beta=0.5), model=replace(config.model, init_from=str(sft))
    )
    return train(tmp_path_factory.mktemp("dpo") / "run", later)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, dpo: Path, pairs: Path) -> list[dict]:
    path = tmp_path_factory.mktemp("out") / "one.jsonl"
    evaluate_pairs(dpo, pairs, per_pair=path, with_ids=True)
    return rows_of(path)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_same_rows(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert list(a) == list(b)
        for key, value in b.items():
            assert a[key] == (pytest.approx(value, abs=NATS) if "logp" in key else value), key


@torch.no_grad()
def test_values_are_those_of_one_sequence_at_a_time(dpo: Path, one_rank: list[dict]) -> None:
    """Every answer behind its own copy of the prompt, alone in a batch, through plain log_softmax of the logits."""
    from nova_kernels.segments import segment_index
    from nova_sys.inference import load_model
    from nova_sys.model.attention import PackLayout
    from nova_sys.saved_config import checkpoint_config

    folder, config = checkpoint_config(dpo, ['algo.name="dpo"'])
    with parallel_run(config.parallel, seed=1) as parallel:
        (model,) = load_model(folder, config, parallel)
        for row in one_rank:
            for name in ("chosen", "rejected"):
                answer = row[f"{name}_ids"]
                tokens_T = torch.tensor(row["prompt_ids"] + answer)
                segments_S4 = torch.tensor([[0, len(tokens_T), 0, 0]], dtype=torch.int32)
                layout = PackLayout(segments_S4, segment_index(segments_S4, len(tokens_T)))
                row_R = torch.arange(len(row["prompt_ids"]) - 1, len(tokens_T) - 1)
                logits_RV = model.run(tokens_T, layout, row_R, None).double()
                logp_R = torch.log_softmax(logits_RV, dim=-1)[range(len(answer)), answer]
                assert row[f"{name}_logp"] == pytest.approx(float(logp_R.sum()), abs=NATS)
                assert row[f"{name}_tokens"] == len(answer)


def test_values_do_not_depend_on_packs(
    tmp_path: Path, dpo: Path, pairs: Path, one_rank: list[dict]
) -> None:
    variants = (["data.pack_length=1024"], ["data.share_prefix=false"], ["train.seed=99"])
    for number, overrides in enumerate(variants):
        path = tmp_path / f"{number}.jsonl"
        evaluate_pairs(dpo, pairs, per_pair=path, with_ids=True, overrides=overrides)
        assert_same_rows(rows_of(path), one_rank)


def test_command_on_four_ranks_writes_the_same_file(
    tmp_path: Path, dpo: Path, pairs: Path, one_rank: list[dict]
) -> None:
    """TP2 x PP2 through the user's own command."""
    out = tmp_path / "four.jsonl"
    four = ["--nproc", "4", "--set", "parallel.tensor=2", "--set", "parallel.pipeline=2"]
    command = [sys.executable, "-m", "nova_sys.cli", "evaluate", str(dpo), "--data", str(pairs)]
    done = subprocess.run(
        [*command, "--per-pair", str(out), "--with-ids", *four],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    assert "pairs            41 of 41 records\nreward accuracy  " in done.stdout
    assert "sigmoid, beta 0.5, without a reference" in done.stdout
    assert done.stdout.count("reward accuracy") == 1, "only the main rank speaks"
    assert_same_rows(rows_of(out), one_rank)


def on_a_rank(rank: int, jobs: list[tuple]) -> list[float]:
    return [
        evaluate_pairs(dpo, data, per_pair=out, with_ids=True, overrides=layout).margin.mean
        for dpo, data, out, layout in jobs
    ]


def test_other_layouts_write_the_same_file(
    tmp_path: Path, dpo: Path, pairs: Path, one_rank: list[dict]
) -> None:
    """DP2, also with a single pair, of which one rank has nothing; CP2; TP2 with sequence parallelism."""
    single = tmp_path / "single.jsonl"
    single.write_text(pairs.read_text().splitlines()[7] + "\n")
    layouts = {"dp2": [], "cp2": ["context=2"], "tp2": ["tensor=2", "sequence=true"]}
    jobs = [
        (dpo, pairs, tmp_path / f"{name}.jsonl", [f"parallel.{setting}" for setting in settings])
        for name, settings in layouts.items()
    ]
    one_pair = tmp_path / "one_pair.jsonl"
    margins = run_ranks(on_a_rank, 2, [*jobs, (dpo, single, one_pair, [])], timeout_s=300)
    assert margins[0] == margins[1], "every rank has the result"
    for _, _, out, _ in jobs:
        assert_same_rows(rows_of(out), one_rank)
    (row,) = rows_of(one_pair)
    expected = {**one_rank[7], "file": str(single), "line": 1}
    assert_same_rows([row], [expected])


def test_rows_join_to_the_input(tmp_path: Path, dpo: Path) -> None:
    """Two files with lines that cannot be used: every row says where its pair stands."""
    first, second = pair_lines(6, seed=5)[:3], pair_lines(6, seed=5)[3:]
    same = json.dumps({"prompt": "Q", "chosen": "abc", "rejected": "abc"})
    empty = json.dumps({"prompt": "Q", "chosen": "abc", "rejected": ""})
    files = [tmp_path / "b.jsonl", tmp_path / "a.jsonl"]
    files[0].write_text("\n".join([same, first[0], "", first[1], empty, first[2]]) + "\n")
    files[1].write_text("\n".join([*second, same]) + "\n")
    out = tmp_path / "out.jsonl"
    out.write_text("what was there before\n")
    result = evaluate_pairs(
        dpo, [str(f) for f in files], per_pair=out, overrides=["data.max_skipped=0.5"]
    )
    rows = rows_of(out)
    places = [(str(files[0]), n) for n in (2, 4, 6)] + [(str(files[1]), n) for n in (1, 2, 3)]
    assert [(row["file"], row["line"]) for row in rows] == places
    assert list(rows[0])[:4] == ["chosen_logp", "rejected_logp", "chosen_tokens", "rejected_tokens"]
    lines = {str(f): f.read_text().splitlines() for f in files}
    for row in rows:
        pair = json.loads(lines[row["file"]][row["line"] - 1])
        assert (row["chosen_tokens"] < row["rejected_tokens"]) == (
            len(pair["chosen"]) < len(pair["rejected"])
        )
    text = summary_text(result, None)
    assert "6 of 9 records (left out: 1 empty_answer, 2 identical_answers)" in text
    assert list(tmp_path.glob("*.partial")) == []


def test_reference_gives_margins_and_columns(
    tmp_path: Path, dpo: Path, sft: Path, pairs: Path, one_rank: list[dict]
) -> None:
    out = tmp_path / "out.jsonl"
    result = evaluate_pairs(dpo, pairs, sft, per_pair=out)
    rows = rows_of(out)
    margins = np.array(
        [
            0.5 * (r["chosen_logp"] - r["ref_chosen_logp"])
            - 0.5 * (r["rejected_logp"] - r["ref_rejected_logp"])
            for r in rows
        ]
    )
    assert result.margin.mean == pytest.approx(margins.mean(), rel=1e-9)
    assert result.reward_accuracy.mean == (margins > 0).mean() > 0.5
    nll = -sum(r["chosen_logp"] for r in rows) / sum(r["chosen_tokens"] for r in rows)
    assert result.chosen_nll.mean == pytest.approx(nll, rel=1e-12)
    assert result.rejected_nll.low < result.rejected_nll.mean < result.rejected_nll.high
    text = summary_text(result, "SFT")
    share, margin, *nlls = re.findall(r"(-?[\d.]+) \((-?[\d.]+) to (-?[\d.]+)\)", text)
    for printed, found in ((share, result.reward_accuracy), (margin, result.margin)):
        assert [float(n) for n in printed] == pytest.approx([*vars(found).values()], abs=1e-4)
    assert len(nlls) == 2 and "in brackets: 95% confidence intervals" in text
    assert "sigmoid, beta 0.5, against SFT" in text and "over all tokens of these answers" in text
    sft_rows = tmp_path / "sft.jsonl"
    evaluate_pairs(sft, pairs, per_pair=sft_rows)
    for row, of_sft in zip(rows, rows_of(sft_rows), strict=True):
        assert row["ref_chosen_logp"] == pytest.approx(of_sft["chosen_logp"], abs=NATS)


def test_against_itself_every_pair_is_a_tie(
    dpo: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(evaluate, "TELL_EVERY_S", -1.0)
    with caplog.at_level("INFO", "nova_sys"):
        result = evaluate_pairs(dpo, pairs, dpo)
    assert sum("evaluate: 100% of the answers by" in text for text in caplog.messages) == 2
    assert result.margin == Estimate(0.0, 0.0, 0.0)
    assert result.reward_accuracy.mean == 0.5


def test_margins_are_those_of_the_loss(dpo: Path, pairs: Path, one_rank: list[dict]) -> None:
    simpo = ['algo.loss="simpo"', "algo.beta=2.0"]
    result = evaluate_pairs(dpo, pairs, overrides=simpo)
    means = [
        r["chosen_logp"] / r["chosen_tokens"] - r["rejected_logp"] / r["rejected_tokens"]
        for r in one_rank
    ]
    assert result.margin.mean == pytest.approx(2 * np.mean(means), rel=1e-5)
    assert "simpo, beta 2, which reads no reference" in summary_text(result, None)


def test_reference_with_other_ids_is_refused(
    tmp_path: Path, dpo: Path, config: RunConfig, pairs: Path
) -> None:
    other = tmp_path / "numbers.jsonl"
    other.write_text("".join(line.replace("a", "7") + "\n" for line in pair_lines(30, seed=9)))
    changed = replace(config, data=replace(config.data, train=str(other)))
    stranger = train(tmp_path / "run", replace(changed, train=TrainConfig(steps=1)))
    with pytest.raises(ValueError, match="an id must keep its meaning"):
        evaluate_pairs(dpo, pairs, stranger)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_pair_at_all_is_refused(tmp_path: Path, dpo: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        evaluate_pairs(dpo, path)


def test_a_log_prob_that_is_not_finite_is_told(
    tmp_path: Path, dpo: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_nan(*_: object, **__: object) -> np.ndarray:
        return np.where(np.arange(82) == 9, np.nan, -1.0)

    monkeypatch.setattr(evaluate, "compute_logps", with_nan)
    out = tmp_path / "out.jsonl"
    with pytest.raises(ToldStop, match=r"1 of 82 answers.*pairs\.jsonl:5;") as told:
        evaluate_pairs(dpo, pairs, per_pair=out)
    assert is_user_error(told.value)  # in red, without a traceback
    assert not out.exists()


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")

    def rows(error: BaseException):
        yield "a row\n"
        raise error

    for error, seen in ((OSError(28, "No space left"), ValueError), (KeyboardInterrupt(),) * 2):
        expected = pytest.raises(seen if isinstance(seen, type) else KeyboardInterrupt)
        with expected, whole_file("--per-pair", out) as stream:
            stream.writelines(rows(error))
        assert out.read_text() == "old\n" and list(tmp_path.iterdir()) == [out]


def test_a_template_file_is_the_checkpoints_own(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by a relative path, edited after the run, and gone: the numbers stay those of the text that was trained on."""
    text = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    text += "{% if add_generation_prompt %}<assistant>{% endif %}"
    monkeypatch.chdir(tmp_path)
    Path("t.jinja").write_text(text)
    data = replace(config.data, template="t.jinja")
    run = train(tmp_path / "run", replace(config, data=data))
    (folder,) = (run / "checkpoints").iterdir()
    assert (folder / "template.jinja").read_text() == text
    evaluate_pairs(run, config.data.train, per_pair=Path("before.jsonl"), with_ids=True)
    other = text.replace("}}>", "}}> says").replace("<assistant>", "<assistant> says")
    Path("t.jinja").write_text(other)
    evaluate_pairs(run, config.data.train, per_pair=Path("edited.jsonl"), with_ids=True)
    Path("t.jinja").rename("other.jinja")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    evaluate_pairs(run, config.data.train, per_pair=Path("../gone.jsonl"), with_ids=True)
    asked = ["data.template=../other.jinja"]
    evaluate_pairs(run, config.data.train, per_pair=Path("../asked.jsonl"), overrides=asked)
    rows = {path.stem: rows_of(path) for path in tmp_path.glob("*.jsonl")}
    assert rows["before"] == rows["edited"] == rows["gone"]
    assert rows["asked"][0]["chosen_logp"] != rows["before"][0]["chosen_logp"]


def test_intervals() -> None:
    share = Estimate.of_share(np.array([1.0] * 9 + [0.0]))  # the textbook's 9 of 10
    assert (share.mean, share.low, share.high) == pytest.approx((0.9, 0.59585, 0.98212), abs=1e-5)
    everything = Estimate.of_share(np.ones(10))
    assert (everything.low, everything.high) == pytest.approx((0.72247, 1.0), abs=1e-5)
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    mean = Estimate.of_mean(values)
    assert mean.mean == pytest.approx(values.mean())
    assert mean.high - mean.mean == pytest.approx(1.959964 * values.std(ddof=1) / 20)
    assert str(Estimate.of_mean(np.array([2.0]))) == "2.0000 (one pair)"


def test_nll_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Answers of very different lengths: the interval of the ratio, not that of a mean of means."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        tokens = rng.integers(1, 60, 80)
        nats = rng.gamma(2.0 * tokens, 1.0)  # 2 nats per token
        estimate = Estimate.of_ratio(nats, tokens)
        covered += estimate.low <= 2.0 <= estimate.high
    assert 0.92 < covered / 400 < 0.98


def test_tokens_are_counted_as_they_are_summed(sft: Path, tmp_path: Path) -> None:
    """Without a prompt and a BOS, nothing predicts an answer's first token, and it is in no sum."""
    lines = pair_lines(3, seed=1)
    lines[1] = json.dumps({"prompt": "", "chosen": "abc def", "rejected": "fed"})
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text("\n".join(lines) + "\n")
    evaluate_pairs(sft, data, per_pair=out, with_ids=True)
    for row in rows_of(out):
        missing = int(not row["prompt_ids"])
        assert row["chosen_tokens"] == len(row["chosen_ids"]) - missing
        assert row["rejected_tokens"] == len(row["rejected_ids"]) - missing
