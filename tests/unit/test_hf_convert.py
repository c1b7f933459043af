"""Hugging Face folders and checkpoints of ours: there and back bit for bit, and transformers loads and continues the same."""

from __future__ import annotations

import importlib.util
import itertools
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nova_sys.config_io import check, config_from
from nova_sys.data.records import Message
from nova_sys.data.render import Renderer
from nova_sys.data.tokenizer import load_tokenizer
from nova_sys.data.tokenizer_training import train_sentencepiece
from nova_sys.generate import generate
from nova_sys.hf.carried import carried_texts, more_stop_ids
from nova_sys.hf.config_json import read_model
from nova_sys.hf.convert import from_hf, to_hf
from nova_sys.hf.export_tokenizer import make_loadable
from nova_sys.sampling import Sampling

transformers = pytest.importorskip("transformers")
spec = importlib.util.spec_from_file_location("hf_models", Path(__file__).with_name("hf_models.py"))
assert spec is not None and spec.loader is not None
hf_models: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hf_models)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("hf")
    return {name: hf_models.make(name, root / name) for name in hf_models.OPTIONS}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are tiny, and the machine may be busy."""
    monkeypatch.setattr("nova_sys.parallel.use_cpu_threads", lambda: torch.set_num_threads(1))


@pytest.fixture
def folder(references: dict[str, Any], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(references["qwen2"].folder, tmp_path / "qwen2"))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


# -- there and back ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hf_models.OPTIONS)
def test_there_and_back_is_bit_identical(
    references: dict[str, Any], tmp_path: Path, name: str
) -> None:
    source = references[name].folder
    from_hf(source, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back", shard_bytes=20_000)
    there, back = weights_of(source), weights_of(tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    assert there.keys() == back.keys()
    for key, tensor in there.items():
        assert tensor.dtype == back[key].dtype and torch.equal(tensor, back[key]), key
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back")
    )
    assert after == before
    assert read_model(source) == read_model(tmp_path / "back")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (source / file).read_bytes()
    if "baichuan" not in name:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
        assert type(loaded) is type(references[name].model)
        ids = torch.tensor([hf_models.probe_ids()])
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, references[name].model(ids).logits)
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
        assert tokenizer("hi </s>").input_ids == [71, 72, 220, 257]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("low_freq_factor", 5.0, r"model\.rope_low_freq_factor = 5\.0: must be below model"),
        ("rope_theta", 1e39, r"model\.rope_base = 1e\+39: must be finite and above 0, at most 3e"),
    ],
)
def test_a_folder_that_breaks_a_rule_of_models_is_refused(
    references: dict[str, Any], tmp_path: Path, key: str, value: float, says: str
) -> None:
    """In the words that a run from the folder would be refused with."""
    source = Path(shutil.copytree(references["llama3"].folder, tmp_path / "llama3"))
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"][key] = value
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says) as told:
        from_hf(source, tmp_path / "ours")
    assert str(source / "config.json") in str(told.value) and not (tmp_path / "ours").exists()
    with pytest.raises(ValueError, match=says):
        check(config_from([f"model.init_from={source}", "data.train=x"], source), 1)


def test_files_respect_their_size(references: dict[str, Any], tmp_path: Path) -> None:
    from_hf(references["llama"].folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "whole")
    assert [f.name for f in (tmp_path / "whole").glob("*.safetensors*")] == ["model.safetensors"]
    to_hf(tmp_path / "ours", tmp_path / "parts", shard_bytes=40_000)
    files = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(files) >= 3 and all(file.stat().st_size < 50_000 for file in files)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    tensors = weights_of(tmp_path / "parts")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    from_hf(tmp_path / "parts", tmp_path / "again")  # several files with an index are read, too


@pytest.mark.parametrize(
    ("dtype", "expected"), [("keep", "bfloat16"), ("fp32", "float32"), ("fp16", "float16")]
)
def test_dtype_is_kept_or_cast(folder: Path, tmp_path: Path, dtype: Any, expected: str) -> None:
    narrow = {k: v.bfloat16() for k, v in weights_of(folder).items()}
    save_file(narrow, folder / "model.safetensors")
    from_hf(folder, tmp_path / "ours")
    to_hf(tmp_path / "ours", tmp_path / "back", dtype=dtype)
    wanted = getattr(torch, expected)
    for key, tensor in weights_of(tmp_path / "back").items():
        assert torch.equal(tensor, narrow[key].to(wanted)) and tensor.dtype == wanted
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == expected
    from_hf(folder, tmp_path / "cast", dtype="fp32")
    to_hf(tmp_path / "cast", tmp_path / "wide")
    assert all(t.dtype == torch.float32 for t in weights_of(tmp_path / "wide").values())


def test_what_fp16_cannot_hold_is_told(folder: Path, tmp_path: Path) -> None:
    large = weights_of(folder)
    large["model.norm.weight"][3] = 1e5
    save_file(large, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"final_layernorm.*is not finite in float16"):
        from_hf(folder, tmp_path / "ours", dtype="fp16")
    assert not list(tmp_path.glob("*ours*"))


def test_nothing_is_overwritten(references: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        from_hf(references["llama"].folder, tmp_path / "ours")
    assert list((tmp_path / "ours").iterdir()) == []
    from_hf(references["llama"].folder, tmp_path / "new")
    with pytest.raises(ValueError, match="exists already"):
        to_hf(tmp_path / "new", references["llama"].folder)


def test_a_folder_that_cannot_be_written(references: dict[str, Any], tmp_path: Path) -> None:
    source = references["llama"].folder
    with pytest.raises(ValueError, match=r"cannot be written .*File name too long.* make room"):
        from_hf(source, tmp_path / ("x" * 300))
    with pytest.raises(ValueError, match="is a Hugging Face folder already; give a checkpoint"):
        to_hf(source, tmp_path / "ours")
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ValueError, match=r"cannot be written .*File too large.* make room"):
            from_hf(source, tmp_path / "ours")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert list(tmp_path.iterdir()) == []


def test_memory_of_an_export_is_a_tensor_not_the_model(
    references: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor is written before the next one is made."""
    from nova_sys.hf import convert

    from_hf(references["llama"].folder, tmp_path / "ours")
    events: list[str] = []
    make, write = convert.their_tensor, convert.write_sharded

    def made(row: Any, *args: Any) -> torch.Tensor:
        events.append("made")
        return make(row, *args)

    def written(folder: Path, planned: Any, tensors: Any, **options: Any) -> None:
        def told() -> Any:
            for tensor in tensors:
                yield tensor
                events.append("written")

        write(folder, planned, told(), **options)

    monkeypatch.setattr(convert, "their_tensor", made)
    monkeypatch.setattr(convert, "write_sharded", written)
    to_hf(tmp_path / "ours", tmp_path / "back")
    assert len(events) > 60
    assert all(a != b for a, b in itertools.pairwise(events))


# -- tokenizers, templates, generation -----------------------------------------------------------------------------------------


DIALOGUE: list[Message] = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "2+2?\n"},
    {"role": "assistant", "content": "  4, I think "},
    {"role": "user", "content": "Größe ☃?"},
    {"role": "assistant", "content": "1.80"},
]


def test_chat_template_and_mask_are_those_of_transformers(references: dict[str, Any]) -> None:
    """Token for token: a prompt to be answered, and what of a whole dialogue carries loss."""
    from nova_sys.data.encode import tokenise

    source = references["qwen2"].folder
    theirs = transformers.AutoTokenizer.from_pretrained(source)
    renderer = Renderer(load_tokenizer(source), "auto", "sft")
    for turns in (DIALOGUE[:2], DIALOGUE[:4]):
        expected = theirs.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert renderer.prompt_ids(turns) == list(expected)
    whole = theirs.apply_chat_template(
        DIALOGUE, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(whole["input_ids"]), list(whole["assistant_masks"])
    part = tokenise([renderer._dialogue_parts(DIALOGUE, None, 0)[1]], renderer.tokenizer)[0]
    length = len(part.tokens)  # nothing is learned behind the last end of turn, and it is cut there
    assert part.tokens.tolist() == ids[:length] and part.loss.tolist() == mask[:length]
    assert sum(mask) > 10 and not any(mask[length:]) and len(ids) - length == 1


def test_a_tokenizer_trained_here_is_the_same_in_transformers(tmp_path: Path) -> None:
    texts = [
        f"{word} {word[::-1]} Größe, 12 of {n}" for n, word in enumerate(["some", "words"] * 90)
    ]
    markers = ("\n\nHuman:", "\n\nAssistant:")
    ours = train_sentencepiece(texts, 400, tmp_path / "tokenizer.model", markers)
    make_loadable(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    probes = [
        "some words  of 1234 Größe",
        "\n\nHuman: ☃ emos\n\nAssistant:",
        " lead</s>",
        "\ta \n b ",
    ]
    for text in [*texts[:20], *probes]:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == ours.encode(text, control=True)
        assert theirs.decode(ids) == text
    assert theirs("some").input_ids[0] == ours.bos_id


@pytest.mark.parametrize("name", ["llama3", "qwen2", "qwen3", "baichuan-m1"])
def test_greedy_generation(references: dict[str, Any], name: str) -> None:
    """64 tokens through `nova generate`'s own function, with its cache. Greedy means: each is the likeliest one behind those before
    it, which one forward pass of transformers over the whole text shows."""
    reference = references[name]
    prompts = ["What is", "a", "long enough to be a prompt of some more tokens"]
    done = list(generate(reference.folder, prompts, Sampling(max_new_tokens=64)))
    assert len({tuple(completion.ids) for completion in done}) == 3
    for completion in done:
        whole = completion.prompt_ids + completion.ids
        assert whole[0] == 256  # the tokenizer's BOS
        with torch.no_grad():
            likeliest = hf_models.reference_logits(reference, whole).argmax(-1).tolist()
        assert completion.ids == likeliest[len(completion.prompt_ids) - 1 : -1]
        assert len(completion.ids) == 64 or completion.ids[-1] in (257, 259)
    assert max(len(completion.ids) for completion in done) == 64


def test_greedy_generation_as_transformers_runs_it(references: dict[str, Any]) -> None:
    reference = references["mistral"]
    (ours,) = generate(reference.folder, ["What is"], Sampling(max_new_tokens=64))
    ids = torch.tensor([ours.prompt_ids])
    theirs = reference.model.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert ours.ids == theirs[0, ids.shape[1] :].tolist()
    assert len(ours.ids) == 64


def test_more_than_one_eos(references: dict[str, Any], tmp_path: Path) -> None:
    """generation_config.json, or without one config.json, may list several, and transformers stops at each."""
    source = Path(shutil.copytree(references["llama"].folder, tmp_path / "folder"))
    (first,) = generate(source, ["abc"], Sampling(max_new_tokens=12))
    stop = first.ids[5]
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, stop]}))
    (second,) = generate(source, ["abc"], Sampling(max_new_tokens=12))
    assert second.ids == first.ids[: first.ids.index(stop) + 1] and second.finish_reason == "stop"
    carried = carried_texts(source)
    assert carried.keys() == {"hf.config.json", "hf.generation_config.json"}
    (source / "generation_config.json").unlink()
    config = json.loads((source / "config.json").read_text()) | {"eos_token_id": [257, stop]}
    (source / "config.json").write_text(json.dumps(config))
    assert more_stop_ids(source) == {257, stop}


def test_an_export_of_a_model_that_began_here(
    references: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing is carried that tells where its texts begin and end: transformers would take Llama 2's ids, and not stop at turns."""
    from nova_sys.hf import carried

    from_hf(references["llama"].folder, tmp_path / "ours")
    monkeypatch.setattr(carried, "PREFIX", "nothing.")
    to_hf(tmp_path / "ours", tmp_path / "back")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert loaded.generation_config.eos_token_id == [257, 259]  # </s>, <|im_end|>
    config = loaded.config
    assert (config.bos_token_id, config.eos_token_id) == (256, 257)
    assert config.max_position_embeddings == 2048
    assert caplog.messages == []
    monkeypatch.undo()
    from_hf(references["baichuan"].folder, tmp_path / "with NormHead")
    to_hf(tmp_path / "with NormHead", tmp_path / "without code")
    assert "transformers has no BaichuanForCausalLM by itself" in caplog.text
