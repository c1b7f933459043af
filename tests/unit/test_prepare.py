"""From settings to tokenizer and store: what one rank does for all, what a kill leaves, and what is read of large data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nova_sys.config import DataConfig, ModelConfig, RunConfig, RunSection
from nova_sys.data import digests, prepare, progress, sample, store, tokenizer_training
from nova_sys.data.disk import FullDisk
from nova_sys.data.prepare import prepare_data
from nova_sys.data.tokenizer import Tokenizer, load_tokenizer
from nova_sys.data.tokenizer_training import train_sentencepiece


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "t.model"
    return train_sentencepiece(["the quick brown fox 0123456789"] * 3, 320, path)


def write_pairs(path: Path, count: int) -> None:
    rows = ({"prompt": f"the {i}", "chosen": "fox", "rejected": "quick"} for i in range(count))
    path.write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture
def config(tokenizer: Tokenizer, tmp_path: Path) -> RunConfig:
    """A tokenizer of several files."""
    write_pairs(tmp_path / "a.jsonl", 40)
    write_pairs(tmp_path / "b.jsonl", 20)
    tokenizer.save(tmp_path / "given")
    (tmp_path / "given" / "tokenizer_config.json").write_text('{"clean_up": false}')
    data = DataConfig(
        train=str(tmp_path / "?.jsonl"), tokenizer=str(tmp_path / "given"), pack_length=64
    )
    return RunConfig(run=RunSection(dir=str(tmp_path / "run")), data=data)


def trained(config: RunConfig) -> RunConfig:
    """The same with a tokenizer that is trained on the data."""
    data = replace(config.data, tokenizer="")
    return replace(config, data=data, model=ModelConfig(vocab_size=300))


# What one rank does for all


def test_only_the_main_rank_hashes_the_files(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    real = digests.hash_files
    for module in (prepare, store):
        monkeypatch.setattr(
            module, "hash_files", lambda f, **o: hashed.append(len(f)) or real(f, **o)
        )
    main = prepare_data(config)
    others = [prepare_data(config, verify=False) for _ in range(3)]
    assert hashed == [2]
    assert {other.store.key for other in others} == {main.store.key}
    assert prepare_data(config).store.key == main.store.key
    assert hashed == [2, 2]  # the main rank takes nobody's word
    with (tmp_path / "b.jsonl").open("a") as stream:
        stream.write('\n{"prompt": "the", "chosen": "a", "rejected": "b"}')
    assert prepare_data(config, verify=False).store.key != main.store.key
    assert hashed == [2, 2, 2]


def test_what_takes_long_is_shown(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Hashing, reading for a tokenizer and checking, too."""
    caplog.set_level("INFO")
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    prepare_data(trained(config))
    for what in ("read for a tokenizer", "hashed", "tokenised", "checked"):
        assert any(f"data: 100% {what}, " in message for message in caplog.messages), what
    assert any("100% hashed" in message and "MB/s" in message for message in caplog.messages)


# What a kill, or a full disk, leaves


class Killed(BaseException):
    pass


@pytest.mark.parametrize("files_written", [0, 1, 2])
def test_a_copy_of_a_tokenizer_is_whole_or_not_there(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files_written: int
) -> None:
    """Killed while a file is written, or before the last step; another tokenizer is given next time."""
    left = files_written

    def write_bytes(path: Path, data: bytes) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            real(path, data[: len(data) // 2])
            raise Killed
        return real(path, data)

    def rename(path: Path, target: Path) -> Path:
        if path.name.startswith("tokenizer"):
            raise Killed
        return path.replace(target)

    real = Path.write_bytes
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "write_bytes", write_bytes)
        patch.setattr(Path, "rename", rename)
        prepare_data(config)
    assert not (tmp_path / "run" / "tokenizer").exists()
    (tmp_path / "given" / "tokenizer_config.json").write_text("{}")
    prepared = prepare_data(config)
    assert load_tokenizer(prepared.tokenizer_dir).fingerprint == prepared.tokenizer.fingerprint
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["cache", "tokenizer"]


@pytest.mark.parametrize("torn", ["tokenizer.model", "tokenizer_config.json", "all"])
def test_a_torn_copy_is_completed(config: RunConfig, tmp_path: Path, torn: str) -> None:
    copy = tmp_path / "run" / "tokenizer"
    load_tokenizer(tmp_path / "given").save(copy)
    for path in copy.iterdir():
        if torn in (path.name, "all"):
            path.write_bytes(path.read_bytes()[:9])
        elif path.name == "tokenizer_config.json":
            path.unlink()
    prepared = prepare_data(config)
    assert load_tokenizer(copy).fingerprint == prepared.tokenizer.fingerprint


def test_another_tokenizer_is_refused_as_before(config: RunConfig, tmp_path: Path) -> None:
    copy = tmp_path / "run" / "tokenizer"
    train_sentencepiece(["something else"] * 9, 300, copy / "tokenizer.model")
    with pytest.raises(ValueError, match="holds another tokenizer than"):
        prepare_data(config)


def test_a_trained_tokenizer_is_kept_when_the_disk_is_full(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", "tokens.npy")

    with monkeypatch.context() as patch, pytest.raises(FullDisk, match="No space left"):
        patch.setattr(store, "_build", full)
        prepare_data(trained(config))
    monkeypatch.setattr(prepare, "train_sentencepiece", None)
    prepare_data(trained(config))


def test_no_room_for_a_tokenizer(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FullDisk, match=r"run cannot be written \(No space left .* are free"):
        prepare_data(config)


# What is read of large data


def test_every_nth_block_of_large_data_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nova_sys.data.lines.BLOCK_BYTES", 1000)
    path = tmp_path / "data.jsonl"
    write_pairs(path, 400)
    everything = list(sample.texts_of([path], "pairs"))
    assert len(everything) == 1200
    monkeypatch.setattr(sample, "SAMPLE_BYTES", path.stat().st_size // 5)
    texts = list(sample.texts_of([path], "pairs"))
    assert 150 < len(texts) < 350
    prompts = {int(text.split()[1]) for text in texts if text.startswith("the ")}
    assert min(prompts) < 80 and max(prompts) > 300  # of all of the file


def test_the_sample_has_a_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the lines are; and what is dropped is drawn evenly."""
    monkeypatch.setattr(tokenizer_training, "_MAX_TRAINING_CHARS", 20_000)
    lines = tokenizer_training._sample_lines(f"{i:05}" * 20 for i in range(5000))
    assert 15_000 < sum(map(len, lines)) <= 20_000
    numbers = [int(line[:5]) for line in lines]
    assert len(set(numbers)) == len(numbers)
    assert 2100 < sum(numbers) / len(numbers) < 2900
    short = [f"line {i}" for i in range(100)]
    assert tokenizer_training._sample_lines(short) == short
