"""Bad recipes, settings and layouts; checkpoints, caches and stores of something else."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

spec = importlib.util.spec_from_file_location("small_run", Path(__file__).with_name("small_run.py"))
assert spec is not None and spec.loader is not None
small_run = importlib.util.module_from_spec(spec)
sys.modules["small_run"] = small_run  # dataclasses look there
spec.loader.exec_module(small_run)
nova, refuses, run = small_run.nova, small_run.refuses, small_run.run  # fixtures
finished, trained = small_run.finished, small_run.trained

Run = Any  # small_run.SmallRun
Refuses = Callable[..., str]
Says = tuple[str, str, str]
"""Parts of a refusal: what was seen, the rule, what to change."""

# fmt: off
RECIPES: dict[str, tuple[bytes, int | None, Says]] = {
    "syntax": (b"[data]\n\ntrain = \n", 3, ("Invalid value", "not valid TOML", "correct that place")),
    "key twice": (b"[data]\ntrain = 'a'\ntrain = 'b'\n", 3, ("Cannot overwrite a value", "not valid TOML", "correct that place")),
    "YAML": (b"data:\n  train: a\n", 1, ("Expected '=' after a key", "not valid TOML", "correct that place")),
    "JSON": (b'{"data": 1}', 1, ("Invalid statement", "not valid TOML", "correct that place")),
    "binary": (bytes(range(256)), None, ("byte 0x80 in line 2", "a recipe is TOML, which is UTF-8", "save it as such")),
    "nested too deep": (b"a = " + b"[" * 100_000, None, ("maximum recursion depth", "not valid TOML", "correct that place")),
    "unknown key": (b"[data]\n# a comment\ntrian = 'a'\n", 3, ('data.trian = "a"', "unknown key", "did you mean data.train?")),
    "unknown section": (b"\n[optimiser]\nlr = 1\n", 3, ("optimiser.lr = 1", "unknown key", "did you mean optimizer.lr?")),
    "no section": (b"lr = 1\n", 1, ("lr = 1", "unknown key", "did you mean optimizer.lr?")),
    "section as a value": (b"train = 3\n", 1, ("train = 3", "must be a section", "write [train]")),
    "wrong type": (b"[train]\nsteps = '5'\n", 2, ('train.steps = "5"', "must be a whole number", "train.steps = 5")),
    "wrong choice": (b"[algo]\nname = 'dppo'\n", 2, ('algo.name = "dppo"', 'must be "sft" or "dpo"', 'did you mean "dpo"?')),
    "number too large": (b"[train]\nsteps = 0x" + b"f" * 9000, 2, ("train.steps is set to a larger number than can be read", "at most 64 bits", "correct it")),
    "zero character": (b'[data]\ntrain = "a\\u0000b"\n[model]\nvocab_size = 300\n', None, ('data.train = "a\\u0000b"', "must not hold a zero character", "remove it")),
}
SETTINGS: dict[str, tuple[str, int, Says]] = {
    "mistyped key": ("data.trian=x", 1, ('data.trian = "x"', "unknown key", "did you mean data.train? (in --set)")),
    "no value": ("train.steps", 1, ("--set train.steps", "must read section.key=value", "did you mean train.steps=VALUE?")),
    "heads not divided": ("parallel.tensor=4", 4, ("parallel.tensor = 4", "must divide model.num_kv_heads = 2", "choose one of 1, 2")),
    "FFN not divided": ("parallel.tensor=2 model.ffn_hidden_size=25", 2, ("parallel.tensor = 2", "must divide model.ffn_hidden_size = 25", "choose one of 1")),
    "layers not divided": ("parallel.pipeline=3", 3, ("model.num_layers = 2", "must be a multiple of parallel.pipeline", "change one of the three")),
    "chunks not divided": ("parallel.pipeline=2 parallel.virtual_pipeline=2", 2, ("model.num_layers = 2", "2 * 2 = 4", "change one of the three")),
    "chunks without stages": ("parallel.virtual_pipeline=2", 1, ("parallel.virtual_pipeline = 2", "needs two or more pipeline stages", "set parallel.pipeline to 2")),
    "world not divided": ("parallel.tensor=2 parallel.pipeline=2", 6, ("2 * 2 = 4", "must divide the number of processes, 6", "--nproc 4")),
    "heads not divided by context": ("parallel.context=4", 4, ("parallel.tensor * parallel.context = 1 * 4 = 4", "must divide model.num_kv_heads = 2", "among 1, 2")),
    "pack not divided by context": ("parallel.context=2 data.pack_length=127", 2, ("data.pack_length = 127", "multiple of the 2 ranks that share its tokens", "for example 128")),
    "world not divided by context": ("parallel.context=2", 3, ("parallel.tensor * parallel.context * parallel.pipeline = 1 * 2 * 1 = 2", "processes, 3", "--nproc 2")),
    "batch not divided": ("train.global_batch_packs=3", 2, ("train.global_batch_packs = 3", "must be a multiple of the data-parallel size", "for example 4")),
    "sequence without tensor": ("parallel.sequence=true", 1, ("parallel.sequence = true", "but parallel.tensor is 1", "set that to 2 or more")),
    "pack not divided": ("parallel.sequence=true parallel.tensor=2 data.pack_length=127", 2, ("data.pack_length = 127", "must be a multiple of parallel.tensor", "for example 128")),
    "FP8": (
        "train.precision=fp8 model.num_layers=3 model.hidden_size=64 model.ffn_hidden_size=64", 1,
        ('train.precision = "fp8"', "needs an NVIDIA GPU of compute capability 9.0", "needs Transformer Engine, which is not installed: the README"),
    ),
    "FP8 of no layer": ("train.precision=fp8", 1, ("first_layers_bf16 + fp8.last_layers_bf16 = 1 + 1", "below model.num_layers = 2", "lower them")),
    "FP8 key without FP8": ("fp8.recipe=delayed", 1, ('fp8.recipe = "delayed"', "has no effect with train.precision", 'train.precision to "fp8"')),
    "not a number": ("optimizer.lr=nan", 1, ("optimizer.lr = nan", "must be finite and above 0", "the default is 0.0001")),
    "infinite": ("algo.beta=inf", 1, ("algo.beta = inf", "must be finite and above 0", "the default is 0.1")),
    "negative": ("data.workers=-1", 1, ("data.workers = -1", "must be finite and 0 or more", "the default is 0")),
    "share above 1": ("data.max_skipped=5", 1, ("data.max_skipped = 5.0", "0 or more, at most 1", "the default is 0.05")),
    "more epochs than lives": ("train.epochs=1e300 train.steps=0", 1, ("train.epochs = 1e+300", "at most 1000000.0", "the default is 1.0")),
    "beyond fp32": ("optimizer.lr=1e300", 1, ("optimizer.lr = 1e+300", "above 0, at most 3e+38", "the default is 0.0001")),
    "folder of nobody": ("run.dir=~/runs", 1, ('run.dir = "~/runs"', "must be written out", "/runs (in this config")),
    "no folder": ("run.dir=", 1, ('run.dir = ""', "must name a folder", "for example runs/first")),
    "huge": ("model.hidden_size=1000000000000", 1, ("model.hidden_size = 1000000000000", "at most 2147483647", "the default is 256")),
    "beyond 64 bits": ("train.seed=" + "9" * 30, 1, ("train.seed is set to a larger number", "at most 64 bits", "correct it")),
    "pack too long": ("data.pack_length=16777217", 1, ("data.pack_length = 16777217", "at most 16777216", "the default is 2048")),
    "pack too short": ("data.pack_length=8", 1, ("data.pack_length 8", "16 <= max_length <= pack_length", "Change one of them")),
    "longer than a pack": ("data.max_length=4096", 1, ("data.max_length = 4096", "must not exceed data.pack_length = 128", "lower it")),
    "profile beyond steps": ("log.profile_steps=[5,9]", 1, ("log.profile_steps = [5, 9]", "must end by the last step, which is 2", "choose earlier steps")),
    "profile beyond epochs": ("log.profile_steps=[500,600] train.steps=0", 1, ("log.profile_steps = [500, 600]", "must end by the last step", "choose earlier steps")),
    "nothing to train": ("train.steps=0 train.epochs=0", 1, ("train.epochs = 0", "nothing to train", "set one of them above 0")),
    "no such weights": ("model.init_from=/nowhere", 1, ("/nowhere is not a checkpoint", "no run folder with one", "give a folder like runs/NAME")),
    "weights in a file": ("model.init_from=FOLDER/pairs.jsonl", 1, ("FOLDER/pairs.jsonl is not a checkpoint", "no run folder with one", "give a folder like")),
    "folder without weights": ("model.init_from=FOLDER", 1, ("FOLDER is not a checkpoint", "no run folder with one", "give a folder like")),
    "run in a file": ("run.dir=FOLDER/pairs.jsonl", 1, ("run.dir=FOLDER/pairs.jsonl cannot be written to (", "File exists", "choose another run.dir")),
    "run below a file": ("run.dir=FOLDER/pairs.jsonl/x", 1, ("cannot be written to (", "Not a directory", "choose another run.dir")),
    "cache in a file": ("data.cache_dir=FOLDER/pairs.jsonl", 1, ("data.cache_dir=FOLDER/pairs.jsonl cannot be written to (", "File exists", "choose another data.cache_dir")),
}
# fmt: on


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name: str, run: Run, refuses: Refuses) -> None:
    text, line, says = RECIPES[name]
    path = run.write("bad.toml", text)
    message = refuses("train", path, says=says)
    assert line is None or re.search(rf"{re.escape(str(path))}:{line}\b", message), message


def test_recipe_that_is_no_file(run: Run, refuses: Refuses) -> None:
    path = "give the path of a TOML"
    refuses(
        "train", run.folder / "absent.toml", says=("absent.toml", "there is no such file", path)
    )
    refuses("train", run.folder, says=(f"recipe {run.folder}", "this is a folder", path))


def test_recipe_of_windows_is_read(run: Run, nova: Any) -> None:
    text = run.recipe.read_text().replace("\n", "\r\n")
    run.recipe.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert nova("prepare", run.recipe).code == 0


@pytest.mark.parametrize("name", SETTINGS)
def test_setting(name: str, run: Run, refuses: Refuses) -> None:
    settings, nproc, says = SETTINGS[name]
    train = run.train(*settings.replace("FOLDER", str(run.folder)).split(" "))
    refuses(*train, "--nproc", nproc, says=says)


@pytest.mark.skipif(torch.cuda.is_available(), reason="these kernels run here")
@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_kernels_without_gpu(kernels: str, run: Run, refuses: Refuses, monkeypatch: Any) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    rule = "needs a Hopper GPU" if kernels == "cuda" else "needs an NVIDIA GPU"
    says = (f'train.kernels = "{kernels}"', rule, 'set it to "auto" or "reference"')
    refuses(*run.train(f"train.kernels={kernels}"), says=says)
    assert not (run.dir / "cache").exists()  # told before the data is prepared


@pytest.mark.skipif(torch.cuda.is_available(), reason="these kernels may run here")
def test_kernels_that_an_op_lacks(run: Run, refuses: Refuses, monkeypatch: Any) -> None:
    """Said by the op itself: what was asked for by name is never silently replaced."""
    monkeypatch.setattr("nova_sys.model.build.check_kernels", lambda *_: None)
    seen = "backend='cuda' cannot run here"
    says = (seen, "available for these inputs: reference", 'Use backend="auto"')
    refuses(*run.train("train.kernels=cuda"), says=says)


def test_every_op_gets_the_kernels_asked_for(run: Run, nova: Any, monkeypatch: Any) -> None:
    from nova_kernels import kv_shift_rope, linear_logprob, packed_attention
    from nova_sys.model import attention, output_layer

    asked = []
    for module, op in (
        (attention, kv_shift_rope),
        (attention, packed_attention),
        (output_layer, linear_logprob),
    ):

        def spy(*args: Any, op: Any = op, **options: Any) -> Any:
            asked.append((op.__name__, options["backend"]))
            return op(*args, **options)

        monkeypatch.setattr(module, op.__name__, spy)
    assert nova(*run.train("train.kernels=reference")).code == 0
    assert {name for name, _ in asked} == {"kv_shift_rope", "packed_attention", "linear_logprob"}
    assert {backend for _, backend in asked} == {"reference"}


def test_no_process(run: Run, nova: Any) -> None:
    code, _, err = nova(*run.train(), "--nproc", 0)
    assert code == 2 and "--nproc" in err and "Traceback" not in err
    assert "greater than or equal to 1" in err or "x>=1" in err


def test_bad_data_on_two_processes(run: Run) -> None:
    """The launcher's way: one message, no broken connections around it."""
    path = run.write("bad.jsonl", '{"prompt": \n')
    command = [sys.executable, "-m", "nova_sys.cli", *run.train(f"data.train={path}")]
    command += ["--nproc", "2", "--set", "train.global_batch_packs=2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(f"error: {path}:1: not valid JSON") == 1
    assert "Traceback" not in done.stderr and not run.results()


# -- what another run has left ------------------------------------------------------------------------------------------


def test_weights_of_another_model(trained: Run, refuses: Refuses) -> None:
    weights = f"model.init_from={trained.dir}"
    new = f"run.dir={trained.folder}/new"
    says = (
        "hidden_size: checkpoint 16, config 32",
        "holds another model",
        "set these model.* fields",
    )
    refuses(*trained.train(weights, new, "model.hidden_size=32"), says=says)
    says = ("the tokenizer has", "the model needs a row for each", "Raise model.vocab_size")
    refuses(*trained.train(weights, new, "model.vocab_size=200"), says=says)
    says = ("vocab_size: checkpoint 300, config 400", "holds another model", "to the checkpoint's")
    refuses(*trained.train(weights, new, "model.vocab_size=400"), says=says)


def test_tokenizer_of_other_weights(trained: Run, refuses: Refuses) -> None:
    """Equally many ids, other meanings: nothing would fail, and everything would be wrong."""
    from nova_sys.data.tokenizer_training import train_sentencepiece

    other = trained.folder / "other.model"
    train_sentencepiece(["what else is there to say"] * 9, 300, other)
    says = (
        "is not the one that the weights in",
        "an id must keep its meaning",
        "Leave data.tokenizer out",
    )
    settings = (f"run.dir={trained.folder}/new", f"data.tokenizer={other}")
    refuses(*trained.train(f"model.init_from={trained.dir}", *settings), says=says)


def start_over(run: Run) -> tuple[Path, Path]:
    """A run that has only its caches: token store, reference log-probs."""
    shutil.rmtree(run.dir / "checkpoints")
    (run.dir / "metrics.jsonl").unlink()
    cache = run.dir / "cache"
    return next(cache.glob("tokens-*")), next(cache.glob("reference-*"))


def change(path: Path, at: int, value: int) -> None:
    array = np.load(path)
    array.reshape(-1)[at] = value
    np.save(path, array)


# fmt: off
TORN: dict[str, Callable[[Path], object]] = {
    "no meta": lambda store: (store / "meta.json").unlink(),
    "meta cut": lambda store: (store / "meta.json").write_text((store / "meta.json").read_text()[:-9]),
    "meta of something else": lambda store: (store / "meta.json").write_text("[]"),
    "meta with another value": lambda store: (store / "meta.json").write_text((store / "meta.json").read_text().replace('"vocab_size": ', '"vocab_size": 1')),
    "byte order": lambda store: np.save(store / "lengths.npy", np.load(store / "lengths.npy").view(">i4")),
    "tokens cut": lambda store: os.truncate(store / "tokens.npy", 300),
    "no loss flags": lambda store: (store / "loss.npy").unlink(),
    "ids beyond the vocabulary": lambda store: change(store / "tokens.npy", 7, 10**6),
    "negative ids": lambda store: change(store / "tokens.npy", 7, -5),
    "other tokens": lambda store: change(store / "tokens.npy", 7, 9),
    "offsets": lambda store: change(store / "part_offsets.npy", 3, 10**6),
    "loss flags": lambda store: change(store / "loss.npy", 5, 7),
    "pickled": lambda store: np.save(store / "tokens.npy", np.array([{}], dtype=object), allow_pickle=True),
}
UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda path: os.truncate(path, 300), "cannot be read"),
    "empty": (lambda path: os.truncate(path, 0), "cannot be read"),
    "text": (lambda path: path.write_text("hello"), "cannot be read"),
    "flipped": (lambda path: path.write_bytes(flipped(path.read_bytes())), "Bad CRC-32"),
    "too short": (lambda path: np.savez(path, name=path.stem, logp=np.zeros(5)), "holds float64 (5,)"),
    "another type": (lambda path: np.savez(path, name=path.stem, logp=np.zeros(48, np.int64)), "holds int64 (48,)"),
    "not finite": (lambda path: np.savez(path, name=path.stem, logp=np.full(48, np.nan)), "not finite"),
    "of another run": (lambda path: np.savez(path, name="reference-0", logp=np.zeros(48)), "was written as reference-0"),
    "pickled": (lambda path: np.savez(path, name=path.stem, logp=np.array([{}] * 48, dtype=object)), "Object arrays cannot be loaded"),
}
# fmt: on


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("name", TORN)
def test_torn_token_store(name: str, trained: Run, refuses: Refuses) -> None:
    store, _ = start_over(trained)
    TORN[name](store)
    says = (str(store), "is not a complete token store", "Delete the folder to build it again")
    refuses(*trained.train(), says=says)


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_reference_cache(name: str, tmp_path: Path, caplog: Any) -> None:
    from nova_sys.reference import _read_logps, _write_logps

    cache = tmp_path / "reference-1.npz"
    _write_logps(cache, np.arange(48.0))
    assert np.array_equal(_read_logps(cache, 48), np.arange(48.0))
    spoil, said = UNFIT[name]
    spoil(cache)
    assert _read_logps(cache, 48) is None
    assert said in caplog.text and "the reference log-probs are computed again" in caplog.text


def test_reference_cache_of_another_run_is_computed_again(trained: Run, nova: Any) -> None:
    _, cache = start_over(trained)
    right = np.load(cache)["logp"]
    other = cache.with_name("reference-0.npz")
    np.savez(other, name=other.stem, logp=np.zeros(48))
    other.rename(cache)
    code, _, err = nova(*trained.train("train.steps=1"))
    assert code == 0, err
    assert "was written as reference-0; the reference log-probs are computed again" in err
    assert np.load(cache)["logp"].tobytes() == right.tobytes()


def test_data_that_was_tokenised_before_is_reported_again(trained: Run, nova: Any) -> None:
    """What was left out of it is told by every run, not only by the one that built the store."""
    lines = trained.data.read_text() + '{"prompt": "Q", "chosen": "a", "rejected": "a"}\n'
    trained.data.write_text(lines)
    arguments = [f"run.dir={trained.folder}/new", f"data.cache_dir={trained.folder}/cache"]
    for before in ("data: ", "data (tokenised before): "):
        code, _, err = nova(*trained.train(*arguments, "train.steps=1"))
        assert code == 0, err
        assert f"{before}25 records -> 24 documents" in err and "1 identical_answers" in err
        shutil.rmtree(trained.folder / "new")
        arguments.append(f"data.tokenizer={trained.dir}/tokenizer") if not arguments[2:] else None


# fmt: off
LEFT_BY_ANOTHER: dict[str, str] = {"a list": "[1]", "nested too deep": "[" * 100_000, "cut": '{"a": 1', "text": "null"}
# fmt: on


@pytest.mark.parametrize("name", LEFT_BY_ANOTHER)
def test_unreadable_run_file(name: str, trained: Run, refuses: Refuses) -> None:
    shutil.rmtree(trained.dir / "checkpoints")
    (trained.dir / "run.json").write_text(LEFT_BY_ANOTHER[name])
    says = (
        "holds metrics of a run, but not which one (run.json: ",
        "run.dir=",
        "choose another run.dir",
    )
    refuses(*trained.train(), says=says)


def test_a_first_step_that_cannot_be_right_is_told(trained: Run, nova: Any) -> None:
    """A red line and exit code 2, as for a mistake: it is one of a few that the message names."""
    _, cache = start_over(trained)
    arrays = dict(np.load(cache))
    np.savez(cache, name=arrays["name"], logp=arrays["logp"][::-1])
    code, _, err = nova(*trained.train())
    assert code == 2 and "Traceback" not in err
    assert "error: " in err and "Policy and reference should be equal at step 0" in err
