"""The `nova` command as a user meets it: help, messages, exit codes, and what it hands on."""

from __future__ import annotations

import io
import logging
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nova_sys import cli, saved_config
from nova_sys.config_io import TYPES

COMMANDS = ["train", "prepare", "evaluate", "generate", "keys", "demo"]


@pytest.fixture(autouse=True)
def _logging_as_before():
    yield
    logging.captureWarnings(False)
    root = logging.getLogger()
    for handler in [h for h in root.handlers if type(h).__module__ == "nova_sys.log"]:
        root.removeHandler(handler)


@pytest.fixture
def nova(monkeypatch, capsys):
    """Runs `nova ...` in this process: (exit code, stdout, stderr)."""

    def run(*argv: object) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["nova", *map(str, argv)])
        monkeypatch.delenv("NOVA_DEBUG", raising=False)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        output = capsys.readouterr()
        return caught.value.code, output.out, output.err

    return run


@pytest.fixture
def launched(monkeypatch):
    """Catches what would be launched; the job ends with exit code 5."""
    calls = []

    def launch(*call: object) -> int:
        calls.append(call)
        return 5

    monkeypatch.setattr(cli, "launch", launch)
    return calls


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('[data]\ntrain = "pairs.jsonl"\n[model]\nvocab_size = 512\n')
    return path


def test_help_lists_every_command():
    result = CliRunner().invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    assert all(f" {command} " in result.output for command in COMMANDS)


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("train", ["--set", "--nproc", "--dry-run"]),
        ("prepare", ["--set"]),
        ("evaluate", ["--data", "--reference", "--set", "--nproc", "--per-pair", "--with-ids"]),
        ("generate", ["--file", "--max-new-tokens", "--temperature", "--json", "--nproc", "--set"]),
        ("keys", []),
        ("demo", ["--out"]),
    ],
)
def test_help_of_each_command(command, options):
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert all(option in result.output for option in options)


def test_help_does_not_wait_for_heavy_imports():
    heavy = "{'torch', 'numpy', 'pydantic', 'megatron', 'rich.live'}"
    code = f"import sys, nova_sys.cli; print(sorted({heavy} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout.strip() == "[]"


def test_train_checks_the_recipe_before_it_starts_processes(nova, recipe, launched):
    code, out, err = nova("train", recipe, "--set", "data.trian=x", "--nproc", 2)
    assert code == 2 and out == "" and launched == []
    assert "did you mean data.train?" in err and err.startswith("error: data.trian")
    assert "Traceback" not in err
    code, _, err = nova("train", recipe, "--set", "parallel.tensor=4", "--nproc", 2)
    assert code == 2 and launched == []
    assert "4 * 1 = 4: must divide the number of processes, 2" in err


def test_debug_shows_the_traceback(monkeypatch, recipe):
    monkeypatch.setenv("NOVA_DEBUG", "0")  # restored after the test: --debug sets it
    monkeypatch.setattr(sys, "argv", ["nova", "--debug", "train", str(recipe), "--set", "a.b=1"])
    with pytest.raises(ValueError, match="unknown key"):
        cli.main()


def test_a_fault_is_not_dressed_as_a_mistake(monkeypatch, recipe):
    def launch(*_: object) -> int:
        return int("no number")  # a ValueError too, but not one of ours with advice in it

    monkeypatch.setattr(cli, "launch", launch)
    monkeypatch.setattr(sys, "argv", ["nova", "train", str(recipe)])
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main()


def test_train_hands_on_recipe_and_overrides(nova, recipe, launched):
    flags = ["--set", "train.steps=3", "--set", "run.dir=a b"]
    code, _, _ = nova("train", recipe, *flags, "--nproc", 2)
    assert code == 5
    assert launched == [("nova_sys.train", [str(recipe), *flags], 2)]


def test_dry_run_prints_the_plan_for_that_many_processes(nova, recipe, launched, monkeypatch):
    plan = types.ModuleType("nova_sys.plan")
    plan.plan_text = lambda config, world: f"{config.train.steps} steps on {world}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nova_sys.plan", plan)
    code, out, _ = nova("train", recipe, "--set", "train.steps=3", "--nproc", 4, "--dry-run")
    assert (code, out, launched) == (0, "3 steps on 4\n", [])


@pytest.fixture
def checked(monkeypatch):
    """Catches what would be checked of a checkpoint that is not there."""
    calls = []
    monkeypatch.setattr(saved_config, "config_for", lambda *call: calls.append(call))
    return calls


def test_evaluate_hands_on_its_arguments(nova, launched, checked):
    arguments = ["--data", "a.jsonl", "--data", "b.jsonl", "--reference", "sft"]
    outputs = ["--per-pair", "out.jsonl", "--with-ids", "--set", "algo.beta=0.2"]
    code, _, _ = nova("evaluate", "runs/x", *arguments, *outputs, "--nproc", 2)
    assert code == 5
    assert launched == [("nova_sys.evaluate", ["runs/x", *arguments, *outputs], 2)]
    assert [(str(folder), rest[:2]) for _, folder, *rest in checked] == [
        (folder, [["algo.beta=0.2"], 2]) for folder in ("runs/x", "sft")
    ]
    code, _, err = nova("evaluate", "runs/x", "--data", "a.jsonl", "--with-ids")
    assert code == 2 and "give --per-pair OUT.jsonl too" in err


def test_generate_hands_on_its_arguments(nova, launched, checked):
    options = ["--max-new-tokens", 8, "--temperature", 0.5, "--top-p", 0.9, "--seed", 3]
    options += ["--num-samples", 2, "--chat", "--batch-tokens", 99, "--json", "--with-ids"]
    options += ["--file", "p.txt", "--nproc", 2]
    code, _, _ = nova("generate", "runs/x", *options, "--", "-a b", "c")
    assert code == 5
    expected = ["--prompt=-a b", "--prompt=c", "--max-new-tokens=8", "--temperature=0.5"]
    expected += ["--top-p=0.9", "--seed=3", "--num-samples=2", "--batch-tokens=99"]
    expected += ["--chat", "--json", "--with-ids", "--file=p.txt"]
    assert launched == [("nova_sys.generate", ["runs/x", *expected], 2)]
    assert checked == [(saved_config.GENERATE, Path("runs/x"), [], 2)]
    code, _, err = nova("generate", "runs/x", "a", "--with-ids", "--text")
    assert code == 2 and "give --json or --out" in err


@pytest.mark.parametrize(
    ("options", "terminal", "json_lines"),
    [([], True, False), ([], False, True), (["--text"], False, False), (["--json"], True, True)]
    + [(["--out", "o"], terminal, False) for terminal in (True, False)],
)
def test_generate_prints_text_on_a_terminal_and_json_lines_elsewhere(
    nova, launched, monkeypatch, options, terminal, json_lines
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert nova("generate", "runs/x", "a", *options)[0] == 5
    assert ("--json" in launched[0][1]) == json_lines


def test_generate_reads_standard_input(nova, monkeypatch):
    """When it is asked to, or when there is no other prompt and no terminal; as a file, which every rank can read."""
    seen = []

    def launch(_, argv: list[str], __: int) -> int:
        (flag,) = (part for part in argv if part.startswith("--stdin-file="))
        seen.append(Path(flag.removeprefix("--stdin-file=")).read_text())
        return 0

    def typed(data: str, *, terminal: bool) -> types.SimpleNamespace:
        return types.SimpleNamespace(buffer=io.BytesIO(data.encode()), isatty=lambda: terminal)

    monkeypatch.setattr(cli, "launch", launch)
    for arguments, terminal in (
        ([], False),
        (["--file", "-"], True),
        (["a", "--file", "-"], False),
    ):
        monkeypatch.setattr(sys, "stdin", typed("one\n\u4e2d\n", terminal=terminal))
        assert nova("generate", "runs/x", *arguments)[0] == 0
        assert seen.pop() == "one\n\u4e2d\n"
    monkeypatch.setattr(sys, "stdin", typed("one", terminal=True))
    code, _, err = nova("generate", "runs/x")
    assert code == 2 and "no prompts" in err and seen == []


def test_keys_lists_every_key_once(nova):
    code, out, _ = nova("keys")
    assert code == 0
    assert [line.split(" = ")[0] for line in out.splitlines()] == list(TYPES)
    assert "algo.beta = 0.1" in out and "Strength of the pull" in out


@pytest.mark.parametrize("argv", [["trian"], ["train"], ["train", "r.toml", "--nproc", "0"]])
def test_wrong_usage_exits_with_2(nova, argv):
    code, _, err = nova(*argv)
    assert code == 2 and "Usage" in err


SAYS = """
from nova_sys.errors import exit_on_user_error
from nova_sys.outputs import say
with exit_on_user_error():
    for _ in range(3):
        say("a line")
"""


def test_a_full_disk_and_a_closed_pipe():
    """A message and no traceback; without a word, as other commands end when nobody reads on."""
    command = [sys.executable, "-c", SAYS]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2, done.stderr
    assert "error: standard output cannot be written (No space left on device)" in done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
