"""From a Hugging Face folder to a DPO run and back to a folder, by the commands a user types; transformers agrees at both ends."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")


def beside(path: str) -> Any:
    file = (Path(__file__).parent / path).resolve()
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


hf_models, small_run = beside("../unit/hf_models.py"), beside("small_run.py")
nova = small_run.nova  # fixture

RECIPE = """\
[run]
dir = "{folder}/run"
[model]
init_from = "{folder}/start"
[data]
train = "{folder}/pairs.jsonl"
template = "chatml"
pack_length = 128
[train]
steps = 2
global_batch_packs = 1
[optimizer]
lr = 1e-2
[log]
tensorboard = false
progress = false
"""


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are tiny, and the machine may be busy."""
    monkeypatch.setattr("nova_sys.parallel.use_cpu_threads", lambda: torch.set_num_threads(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model to start from, and a DPO run of two steps from it, which checks that its first loss is ln 2."""
    from nova_sys.train import main

    folder = tmp_path_factory.mktemp("convert")
    hf_models.make("llama3", folder / "start")
    (folder / "pairs.jsonl").write_text(small_run.good_pairs())
    (folder / "recipe.toml").write_text(RECIPE.format(folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nova_sys.parallel.use_cpu_threads", lambda: torch.set_num_threads(1))
        main([str(folder / "recipe.toml")])
    return folder


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def logp_by_transformers(folder: Path, prompt: list[int], answer: list[int]) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logp = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return sum(float(logp[t, token]) for t, token in zip(places, answer, strict=True))


def test_the_run_begins_with_the_folder(run: Path) -> None:
    (first, second) = rows_of(run / "run" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert second["loss"] < first["loss"]
    (checkpoint,) = (run / "run" / "checkpoints").iterdir()
    assert (checkpoint / "hf.config.json").read_bytes() == (
        run / "start" / "config.json"
    ).read_bytes()


def test_what_was_trained_is_what_transformers_loads(
    run: Path, tmp_path: Path, nova: Callable[..., Any]
) -> None:
    out = tmp_path / "export"
    code, said, err = nova("convert", "to-hf", run / "run", out)
    assert (code, said) == (0, f"wrote {out}\n"), err
    before, after = (load_file(f / "model.safetensors") for f in (run / "start", out))
    assert before.keys() == after.keys()
    assert all((before[key] != after[key]).any() for key in before)
    assert json.loads((out / "config.json").read_text())["rope_parameters"]["factor"] == 8.0
    for source in (run / "run", out, run / "start"):  # a checkpoint, its export, what it began with
        per_pair = tmp_path / "pairs.jsonl"
        arguments = ("--per-pair", per_pair, "--with-ids", "--set", "data.template=chatml")
        code, _, err = nova("evaluate", source, "--data", run / "pairs.jsonl", *arguments)
        assert code == 0, err
        row = rows_of(per_pair)[5]
        for answer in ("chosen", "rejected"):
            folder = run / "start" if source == run / "start" else out
            expected = logp_by_transformers(folder, row["prompt_ids"], row[f"{answer}_ids"])
            assert row[f"{answer}_logp"] == pytest.approx(expected, rel=1e-5)


def test_a_folder_serves_as_reference(run: Path, tmp_path: Path, nova: Callable[..., Any]) -> None:
    per_pair = tmp_path / "pairs.jsonl"
    arguments = ("--reference", run / "start", "--per-pair", per_pair)
    code, said, err = nova("evaluate", run / "run", "--data", run / "pairs.jsonl", *arguments)
    assert code == 0 and "against" in said, err
    assert all(row["chosen_logp"] != row["ref_chosen_logp"] for row in rows_of(per_pair))


def test_the_template_of_the_training_is_exported(
    run: Path, tmp_path: Path, nova: Callable[..., Any]
) -> None:
    """Token for token, BOS included: what the run was trained on is what transformers' chat template gives, and where it stops."""
    nova("convert", "to-hf", run / "run", tmp_path / "export")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "export")
    assert generation.eos_token_id == [
        257,
        259,
    ]  # what the folder had, and the template's end of turn
    turns = [{"role": "user", "content": " Größe? "}]
    theirs = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    arguments = ("--chat", "--json", "--with-ids", "--max-new-tokens", 4)
    code, said, err = nova("generate", run / "run", " Größe? ", *arguments)
    assert code == 0, err
    ours = json.loads(said)["prompt_ids"]
    assert ours == list(theirs) and ours[0] == 256


def test_conversion_of_a_folder(run: Path, tmp_path: Path, nova: Callable[..., Any]) -> None:
    """As a checkpoint it generates what the folder generates; nothing is written over it; and it may be trained from."""
    ours = tmp_path / "ours"
    assert nova("convert", "from-hf", run / "start", ours).code == 0
    said = [nova("generate", f, "Q 1", "--max-new-tokens", 9).out for f in (run / "start", ours)]
    assert said[0] == said[1] and json.loads(said[0])["completion_tokens"] == 9
    code, _, err = nova("convert", "from-hf", run / "start", ours)
    assert code == 2 and "exists already, and nothing is written over it; name a new folder" in err
    code, _, err = nova("convert", "from-hf", ours, tmp_path / "again")
    assert code == 2 and "has no config.json: give a Hugging Face folder" in err
    shape = (
        "num_layers=4 hidden_size=32 num_heads=4 num_kv_heads=2 ffn_hidden_size=48 vocab_size=300"
    )
    shape += " tied_embeddings=true rope_base=500.0 rope_scaling=llama3 rope_factor=8.0"
    shape += " rope_original_positions=64 norm_eps=1e-5"
    settings = [f"model.{setting}" for setting in shape.split()]
    settings += [f"model.init_from={ours}", f"run.dir={tmp_path / 'run'}", "train.steps=1"]
    flags = [part for setting in settings for part in ("--set", setting)]
    code, _, err = nova("train", run / "recipe.toml", *flags)
    assert code == 0, err
    same = [rows_of(f / "metrics.jsonl")[0]["grad_norm"] for f in (run / "run", tmp_path / "run")]
    assert same[0] == same[1]
    assert (tmp_path / "run" / "checkpoints" / "step_00000001" / "hf.config.json").is_file()


def test_a_run_goes_on_unless_its_folder_has_changed(
    run: Path, tmp_path: Path, nova: Callable[..., Any]
) -> None:
    copy = Path(shutil.copytree(run / "run", tmp_path / "run"))
    settings = ("--set", f"run.dir={copy}", "--set", "algo.reference=online", "--set")
    code, _, err = nova("train", run / "recipe.toml", *settings, "train.steps=3")
    assert code == 0 and "step 2 is done" in err, err
    (newest,) = (p for p in (copy / "checkpoints").iterdir() if p.name.endswith("3"))
    assert (newest / "hf.config.json").is_file()  # carried on
    file = run / "start" / "model.safetensors"
    kept, tensors = file.read_bytes(), load_file(file)
    tensors["model.embed_tokens.weight"][299, 31] += 1e-3
    try:
        save_file(tensors, file)
        code, _, err = nova("train", run / "recipe.toml", *settings, "train.steps=4")
        assert code == 2 and "is no longer the checkpoint that this run started from" in err, err
    finally:
        file.write_bytes(kept)


def test_a_recipe_that_disagrees_is_told(run: Path, nova: Callable[..., Any]) -> None:
    settings = ("--set", "model.num_layers=3", "--set", f"run.dir={run / 'another'}")
    code, _, err = nova("train", run / "recipe.toml", *settings)
    assert (
        code == 2
        and "model.num_layers = 3: the model in" in err
        and "leave model.num_layers out" in err
    )
    assert not (run / "another").exists()
    settings = ("--set", "model.kv_shift=true", "--set", f"run.dir={run / 'another'}")
    code, said, err = nova("train", run / "recipe.toml", *settings, "--dry-run")
    assert code == 0 and "4 layers, hidden 32, 4/2 heads of 8" in said, err


def test_a_dry_run_misses_a_file(run: Path, tmp_path: Path, nova: Callable[..., Any]) -> None:
    start = Path(shutil.copytree(run / "start", tmp_path / "start"))
    (start / "model.safetensors").unlink()
    settings = ("--set", f"model.init_from={start}", "--set", f"run.dir={tmp_path / 'run'}")
    code, _, err = nova("train", run / "recipe.toml", *settings, "--dry-run")
    assert code == 2 and "has config.json, but no safetensors" in err
