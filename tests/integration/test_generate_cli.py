"""`nova generate` as a user meets it: prompts in, text or JSON lines out, the same tokens on two ranks, and its messages."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nova_sys import cli
from nova_sys.launcher import launch

ROOT = Path(__file__).parents[2]
PAIRS = [
    {"prompt": f"{word * 2} to {word}", "chosen": f" {word} yes", "rejected": f" no {word}"}
    for word in ("ab", "cde", "f", "gh ij", "klm")
]
SETTINGS = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_hidden_size": 48,
    "model.vocab_size": 320,
    "model.init_std": 0.1,
    "model.kv_shift": True,
    "model.kv_shift_init": "random",
    "data.pack_length": 64,
    "data.max_length": 64,
    "algo.name": "sft",
    "train.steps": 40,
    "train.global_batch_packs": 2,
    "optimizer.lr": 1e-2,
    "checkpoint.every_steps": 0,
    "log.tensorboard": False,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A small model that has learned the chosen answers roughly by heart."""
    folder = tmp_path_factory.mktemp("run") / "run"
    recipe = ROOT / "launch" / "recipes" / "dpo_hh_small.toml"
    settings = {**SETTINGS, "run.dir": str(folder), "data.train": str(data)}
    flags = [part for k, v in settings.items() for part in ("--set", f"{k}={json.dumps(v)}")]
    assert launch("nova_sys.train", [str(recipe), *flags], nproc=1) == 0
    return folder


@pytest.fixture
def nova(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """Runs `nova ...` in this process: (exit code, stdout, stderr)."""

    def run(*argv: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["nova", *map(str, argv)])
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    return run


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_text_and_json_lines(nova: Callable, run_dir: Path, data: Path, tmp_path: Path) -> None:
    """Prompts of the command line come before the file's; a small budget gives the same completions as one batch."""
    file = tmp_path / "out.jsonl"
    file.write_text("what was here before\n")
    options = ["--file", data, "--max-new-tokens", 8, "--with-ids"]
    code, out, err = nova("generate", run_dir, "ab to cde", *options, "--out", file)
    assert (code, out) == (0, ""), err
    assert "generate: 6 of 6" in err
    found = lines_of(file.read_text(encoding="utf-8"))
    assert [row["prompt"] for row in found] == ["ab to cde", *(pair["prompt"] for pair in PAIRS)]
    assert [(row["index"], row["sample"]) for row in found] == [(i, 0) for i in range(6)]
    for row in found:
        assert row["prompt_tokens"] == len(row["prompt_ids"])
        assert row["completion_tokens"] == len(row["completion_ids"]) <= 8
        assert row["finish_reason"] == ("length" if row["completion_tokens"] == 8 else "stop")
        assert row["logp"] < 0
    small = ["--json", "--batch-tokens", 30]
    code, out, _ = nova("generate", run_dir, "ab to cde", *options, *small)
    assert code == 0
    for ours, theirs in zip(lines_of(out), found, strict=True):
        assert ours.pop("logp") == pytest.approx(theirs.pop("logp"), rel=1e-5)
        assert ours == theirs
    code, out, _ = nova("generate", run_dir, "ab to cde", "--max-new-tokens", 8, "--text")
    assert (code, out) == (0, f"ab to cde{found[0]['completion']}\n")
    code, out, _ = nova("generate", run_dir, "ab", "--chat", "--json", "--max-new-tokens", 2)
    assert code == 0 and lines_of(out)[0]["prompt"] == [{"role": "user", "content": "ab"}]


def test_evaluate_gives_the_same_log_probs(
    nova: Callable, run_dir: Path, data: Path, tmp_path: Path
) -> None:
    """The sum over a completion that ended is what `nova evaluate` gives for it as an answer."""
    options = ["--temperature", 1.2, "--num-samples", 4, "--max-new-tokens", 30, "--with-ids"]
    code, out, _ = nova("generate", run_dir, "--file", data, *options, "--json")
    assert code == 0
    ended = [
        row for row in lines_of(out) if row["finish_reason"] == "stop" and row["completion"].strip()
    ]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{row['completion']}x"}
        for row in ended
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    scores = tmp_path / "scores.jsonl"
    argv = ["--data", tmp_path / "pairs.jsonl", "--per-pair", scores, "--with-ids"]
    code, _, err = nova("evaluate", run_dir, *argv)
    assert code == 0, err
    compared = 0
    for row, score in zip(ended, lines_of(scores.read_text()), strict=True):
        if score["chosen_ids"] == row["completion_ids"]:  # a text has other spellings, too
            assert score["chosen_logp"] == pytest.approx(row["logp"], rel=1e-5)
            compared += 1
    assert compared >= 3


def test_standard_input_and_two_ranks(nova: Callable, run_dir: Path, tmp_path: Path) -> None:
    """Samples of piped prompts on two ranks are those of a file on one."""
    text = "first line\n\nsecond line\nthird\n"
    (tmp_path / "prompts.txt").write_text(text)
    options = ["--temperature", 1.3, "--top-p", 0.95, "--num-samples", 2, "--seed", 5, "--json"]
    options = [*map(str, options), "--max-new-tokens", "6"]
    code, out, _ = nova("generate", run_dir, "--file", tmp_path / "prompts.txt", *options)
    one = lines_of(out)
    assert code == 0 and [row["sample"] for row in one] == [0, 1] * 3
    assert [row["prompt"] for row in one[::2]] == ["first line", "second line", "third"]
    layout = ["--nproc", "2", "--set", "parallel.tensor=2", "--set", "parallel.sequence=true"]
    done = subprocess.run(
        [sys.executable, "-m", "nova_sys.cli", "generate", str(run_dir), *options, *layout],
        input=text,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(lines_of(done.stdout), one, strict=True):
        assert ours.pop("logp") == pytest.approx(theirs.pop("logp"), rel=1e-5)
        assert ours == theirs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a b c", "--max-new-tokens", 64], "prompt 1 has"),
        (["ab", "", "c", "--max-new-tokens", 4], "prompt 2 is empty"),
        (["ab", "--temperature", "-1"], "temperature = -1.0: must be 0 (greedy) or more"),
        (["ab", "--file", "missing.txt"], "missing.txt: cannot be read"),
        (["ab", "--out", "no/such/folder/x"], "--out no/such/folder/x: cannot be written"),
        (["ab", "--batch-tokens", "0"], "batch_tokens = 0: must be 1 or more"),
        (
            ["ab", "--chat", "--max-new-tokens", 4, "--set", "data.template=none"],
            "prompt 1: the record has turns",
        ),
    ],
)
def test_mistakes_are_told(nova: Callable, run_dir: Path, arguments: list, message: str) -> None:
    code, out, err = nova("generate", run_dir, *arguments)
    text = " ".join(err.split())
    assert code == 2 and out == "" and message in text and "Traceback" not in text


def test_a_refused_prompt_leaves_the_old_file(
    nova: Callable, run_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "out.jsonl"
    for text in ("earlier results\n", None):  # None: there is no such file, and there will be none
        file.unlink() if text is None else file.write_text(text)
        code, _, err = nova("generate", run_dir, "ab " * 40, "--out", file)
        assert code == 2 and "--set data.pack_length=" in err
        assert [path.read_text() for path in tmp_path.iterdir()] == ([text] if text else [])


def test_an_output_that_cannot_be_finished_is_told(nova: Callable, run_dir: Path) -> None:
    code, _, err = nova("generate", run_dir, "ab", "--max-new-tokens", 2, "--out", "/dev/full")
    assert code == 2 and "--out /dev/full: cannot be written (No space left" in err
    assert "Traceback" not in err and not Path("/dev/full").is_file()
