"""One rank decides for long, the others wait: longer than a collective may take."""

from __future__ import annotations

import datetime
import importlib.util
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from nova_kernels.testing import run_ranks

COLLECTIVE_S, LONGER_S = 2.0, 3.5


def told_by(work: Any) -> tuple[str, str]:
    """The class and the text of what it raised."""
    try:
        return "returned", str(work())
    except Exception as error:
        return type(error).__name__, str(error)


def decide(rank: int, folder: str) -> dict[str, tuple[str, str]]:
    """`run_ranks` worker. Collectives of this job end after COLLECTIVE_S; what `late` decides takes LONGER_S."""
    from nova_sys.config import ParallelConfig
    from nova_sys.config_io import config_from
    from nova_sys.hf import folder as hf_folder
    from nova_sys.parallel import from_main, parallel_run
    from nova_sys.trainer import Trainer

    def late(answer: Any) -> Any:
        assert rank == 0, "only the main rank decides"
        time.sleep(LONGER_S)
        return answer

    found, hashed = {}, hf_folder.hash_files
    with parallel_run(ParallelConfig(), seed=1) as parallel:
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=COLLECTIVE_S))
        for error in (ValueError("no such model"), OSError("no such file"), KeyError("a fault")):
            decide_badly = mock.Mock(side_effect=error)
            name = type(error).__name__
            found[name] = told_by(lambda d=decide_badly: from_main(parallel, d, slow=True))
            assert decide_badly.call_count == (rank == 0), "only the main rank decides"
        patches = [
            mock.patch.object(hf_folder, "hash_files", lambda files: late(hashed(files))),
            mock.patch("nova_sys.trainer.carried_texts", side_effect=ValueError("named in time")),
        ]
        settings = [f"model.init_from={folder}/model", f"run.dir={folder}/run", "data.train=x"]
        config = config_from(settings, folder)
        with patches[0], patches[1]:
            found["trainer"] = told_by(lambda: Trainer(config, parallel))
        found["in a collective"] = told_by(lambda: from_main(parallel, lambda: late("yes")))
    dist.destroy_process_group()  # its connections are closed by now; `run_ranks` needs some
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, str]]]:
    path = Path(__file__).parents[1] / "unit" / "mutations.py"
    spec = importlib.util.spec_from_file_location("mutations", path)
    assert spec is not None and spec.loader is not None
    mutations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutations)
    folder = tmp_path_factory.mktemp("slow")
    mutations.hugging_face_model(folder / "model")
    return run_ranks(decide, 2, str(folder), timeout_s=120)


def test_a_mistake_is_told_on_every_rank(ranks: list[dict[str, tuple[str, str]]]) -> None:
    assert [rank["ValueError"] for rank in ranks] == [("ValueError", "no such model")] * 2
    assert [rank["OSError"] for rank in ranks] == [("ValueError", "no such file")] * 2


def test_a_fault_ends_every_rank(ranks: list[dict[str, tuple[str, str]]]) -> None:
    main, other = (rank["KeyError"] for rank in ranks)
    assert main == ("KeyError", "'a fault'")
    assert other == ("RuntimeError", "rank 0 failed: KeyError: 'a fault'")


def test_a_run_from_a_folder_that_takes_long_to_hash(
    ranks: list[dict[str, tuple[str, str]]],
) -> None:
    assert [rank["trainer"] for rank in ranks] == [("ValueError", "named in time")] * 2


def test_a_collective_would_not_have_waited(ranks: list[dict[str, tuple[str, str]]]) -> None:
    kind, text = ranks[1]["in a collective"]
    assert kind == "RuntimeError" and "timed out" in text.lower(), (kind, text)
