"""What a run finds in its folder: another run, a run that is still going on, damaged checkpoints, and harmful ones."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from nova_sys.checkpoint_files import file_sizes, refuse_damaged, refuse_harmful
from nova_sys.config_io import load_recipe
from nova_sys.start import find_start

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "dpo_hh_small.toml"

# -- one run at a time, and no other in its place --------------------------------------------------------------------


def test_two_runs_in_one_folder(make_run: Callable[..., Any]) -> None:
    """The second is refused while the first is there; when the first was killed, nothing is in the way."""
    run = make_run(train__steps=100_000)
    run.start()
    run.until(lambda: len(run.rows()) >= 1)
    first, pid = run.processes, run.processes[0].pid
    run.log = run.log.with_name("second.log")
    run.start()
    assert run.wait() == 2, run.text
    assert f"run.dir={run.folder} is in use by another run (pid {pid} on " in run.text
    assert first[0].poll() is None
    done = len(run.rows())
    os.kill(pid, signal.SIGKILL)
    run.start()
    run.until(lambda: len(run.rows()) > done + 1)
    assert not run.is_over, run.text


@pytest.mark.parametrize("key", ["train.seed", "data.train"])
def test_another_run_does_not_take_the_place_of_one_without_a_checkpoint(
    make_run: Callable[..., Any], write_dialogues: Any, tmp_path: Path, key: str
) -> None:
    run = make_run(checkpoint__every_steps=0, train__steps=100_000)
    run.start()
    run.until(lambda: len(run.rows()) >= 2)
    os.kill(run.processes[0].pid, signal.SIGKILL)
    run.until(lambda: run.is_over)
    before = (run.folder / "metrics.jsonl").read_bytes()
    same = dict(run.settings)
    other = {"train.seed": 7, "data.train": str(write_dialogues(tmp_path / "other.jsonl", 30))}
    run.settings[key] = other[key]
    run.start()
    assert run.wait() == 2, run.text
    what = {"train.seed": "train.seed: 1234 there, 7 here", "data.train": "data: "}[key]
    assert f"run.dir={run.folder} holds another run ({what}" in run.text
    assert (run.folder / "metrics.jsonl").read_bytes() == before
    run.settings = same | {"train.steps": 4}
    run.finish()
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4]


def test_settings_that_may_not_change_and_those_that_may(
    undisturbed: Callable[[int], Any], two_checkpoints: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only what differs is told, also of a table of many settings."""

    def find(**changes: Any) -> str:
        settings = {**undisturbed(1).settings, "run.dir": str(two_checkpoints)}
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        config = load_recipe(RECIPE, [f"{k}={json.dumps(v)}" for k, v in settings.items()])
        caplog.clear()
        try:
            assert find_start(config).resume_from
        except ValueError as error:
            return str(error)
        return caplog.text

    assert find() == ""
    for key, there, here, value in (
        ("parallel.distributed_optimizer", True, False, False),
        ("train.precision", "float32", "bfloat16", "bf16"),
        ("algo.beta", 0.1, 0.2, 0.2),
    ):
        told = find(**{key.replace(".", "__"): value})
        assert f"holds another run ({key}: {there} there, {here} here); choose another" in told
    told = find(optimizer__lr=5e-4, train__steps=30)
    assert "(optimizer.lr: 0.001 before, 0.0005 now; train.steps: 24 before, 30 now)" in told
    description = two_checkpoints / "checkpoints" / "step_00000024" / "nova.json"
    fields = json.loads(description.read_text())
    fields["run"]["parallel.distributed_optimizer"] = False
    description.write_text(json.dumps(fields))
    told = find()
    assert "(parallel.distributed_optimizer: False there, True here)" in told


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(undisturbed: Callable[[int], Any], tmp_path: Path) -> Path:
    """A copy of a run with its checkpoints of steps 23 and 24."""
    return shutil.copytree(undisturbed(1).folder, tmp_path / "copy")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "common.pt", "tokenizer", "nova.json"])  # fmt: skip
@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_every_damaged_file_is_named(two_checkpoints: Path, name: str, damage: Any) -> None:
    before, newest = sorted((two_checkpoints / "checkpoints").glob("step_*"))
    refuse_damaged(newest)
    path = newest / name
    damage(next(path.iterdir()) if path.is_dir() else path)
    with pytest.raises(ValueError, match=f"{newest.name} is damaged: {name}") as told:
        refuse_damaged(newest)
    assert f"{before} is whole; to go on from there, remove the damaged folder" in str(told.value)
    shutil.rmtree(before)
    with pytest.raises(ValueError, match="No earlier one is there: restore it from a copy"):
        refuse_damaged(newest)


def test_a_run_does_not_fall_back_from_a_damaged_checkpoint(
    make_run: Callable[..., Any], undisturbed: Callable[[int], Any], two_checkpoints: Path
) -> None:
    run = make_run()
    run.folder = two_checkpoints
    newest = run.checkpoints()[-1]
    shard = newest / "__0_0.distcp"
    size = shard.stat().st_size
    cut(shard)
    run.start()
    assert run.wait() == 2, run.text
    assert f"{shard.name} has {size - 1:,} bytes, {size:,} expected" in run.text
    shutil.rmtree(newest)  # the remedy
    run.finish()
    assert "step 23 is done" in run.text
    run.assert_same_as(undisturbed(1))


def test_a_checkpoint_without_a_tensor_is_not_called_damaged(
    make_run: Callable[..., Any], two_checkpoints: Path
) -> None:
    run = make_run()
    run.folder = two_checkpoints
    newest = run.checkpoints()[-1]
    edit_metadata(newest, lambda m: m.state_dict_metadata.pop("output_layer.weight"))
    description = json.loads((newest / "nova.json").read_text())
    description["files"] = {k: v for k, v in file_sizes(newest).items() if k != "nova.json"}
    (newest / "nova.json").write_text(json.dumps(description))
    run.start()
    assert run.wait() == 2, run.text
    assert "is no checkpoint of such a run, though nothing of it is damaged" in run.text
    assert "output_layer.weight" in run.text and "Restore" not in run.text


def test_damage_that_leaves_the_size_ends_with_a_word(
    make_run: Callable[..., Any], two_checkpoints: Path
) -> None:
    run = make_run()
    run.folder = two_checkpoints
    shard = run.checkpoints()[-1] / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    (two_checkpoints / "metrics.jsonl").unlink()
    run.start()
    assert run.wait() == 2, run.text
    assert "cannot be loaded, though its files have the right sizes" in run.text


# -- harm --------------------------------------------------------------------------------------------------------------


class Harmful:
    """Runs code when it is unpickled: creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def edit_metadata(checkpoint: Path, change: Callable[[Metadata], None]) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common(checkpoint: Path, harmful: Harmful) -> None:
    torch.save({"step": harmful}, checkpoint / "common.pt")


def in_metadata(checkpoint: Path, harmful: Harmful) -> None:
    edit_metadata(checkpoint, lambda metadata: setattr(metadata, "planner_data", harmful))


def in_bytes(checkpoint: Path, harmful: Harmful) -> None:
    """In place of a tensor, which torch would load with weights_only."""

    def declare_bytes(metadata: Metadata) -> None:
        assert metadata.storage_data is not None
        index = next(i for i in metadata.storage_data if i.fqn == "random.cpu")
        del metadata.storage_data[index]
        place = next(iter(metadata.storage_data.values()))
        torch.save(harmful, checkpoint / "__9_0.distcp")
        length = (checkpoint / "__9_0.distcp").stat().st_size
        metadata.storage_data[type(index)("random.cpu")] = type(place)("__9_0.distcp", 0, length)
        metadata.state_dict_metadata["random.cpu"] = BytesStorageMetadata()

    edit_metadata(checkpoint, declare_bytes)


def in_tensor(checkpoint: Path, harmful: Harmful) -> None:
    """Where a tensor is expected."""

    def elsewhere(metadata: Metadata) -> None:
        assert metadata.storage_data is not None
        index, place = next(iter(metadata.storage_data.items()))
        torch.save(harmful, checkpoint / "__9_0.distcp")
        length = (checkpoint / "__9_0.distcp").stat().st_size
        metadata.storage_data[index] = type(place)("__9_0.distcp", 0, length)

    edit_metadata(checkpoint, elsewhere)


def outside(checkpoint: Path, harmful: Harmful) -> None:
    """A file of somebody else, by a path that leads out of the folder."""

    def elsewhere(metadata: Metadata) -> None:
        assert metadata.storage_data is not None
        index, place = next(iter(metadata.storage_data.items()))
        metadata.storage_data[index] = type(place)("../../metrics.jsonl", 0, place.length)

    edit_metadata(checkpoint, elsewhere)


@pytest.mark.parametrize(
    ("hide", "word"),
    [
        (in_common, "common.pt holds more than plain values"),
        (in_metadata, r"it refers to pathlib"),
        (in_bytes, "declares random.cpu to be bytes"),
        (outside, "refers to ../../metrics.jsonl"),
        (in_tensor, None),
    ],
)
def test_loading_runs_no_code_of_a_checkpoint(
    make_run: Callable[..., Any], two_checkpoints: Path, hide: Any, word: str | None
) -> None:
    run = make_run()
    run.folder = two_checkpoints
    newest = run.checkpoints()[-1]
    marker = two_checkpoints / "executed"
    hide(newest, Harmful(marker))
    description = json.loads((newest / "nova.json").read_text())
    description["files"] = file_sizes(newest)
    del description["files"]["nova.json"]
    (newest / "nova.json").write_text(json.dumps(description))
    if word is not None:
        with pytest.raises(ValueError, match="that could run code hidden in it: .*" + word):
            refuse_harmful(newest)
    if hide in (in_tensor, in_bytes):  # through Megatron's and torch's own readers
        run.start()
        assert run.wait() == 2, run.text
        assert "cannot be loaded" in run.text or "is not loaded" in run.text
    assert not marker.exists()


@pytest.mark.parametrize("hide", [in_metadata, in_bytes])
def test_the_harm_is_real(two_checkpoints: Path, hide: Any) -> None:
    """What these checkpoints hold does run, where nobody looks first."""
    marker = two_checkpoints / "executed"
    newest = sorted((two_checkpoints / "checkpoints").glob("step_*"))[-1]
    hide(newest, Harmful(marker))
    reader = FileSystemReader(newest)
    load(
        {"random.cpu": torch.empty(1, 5056, dtype=torch.uint8)}, storage_reader=reader, no_dist=True
    )
    assert marker.exists()
