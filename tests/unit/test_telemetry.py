"""metrics.jsonl, TensorBoard and traces, read back by the readers that users have."""

from __future__ import annotations

import io
import json
import logging
import math
import typing

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nova_sys import telemetry
from nova_sys.algo import build_algorithm
from nova_sys.config import AlgoConfig, LogConfig
from nova_sys.config_io import TYPES
from nova_sys.telemetry import TAGS, Telemetry

QUIET = LogConfig(tensorboard=False, progress=False, every_steps=1000)


def start(run_dir, *, start_step=0, total_steps=10, log=QUIET, algorithm="dpo", is_main=True):
    return Telemetry(
        run_dir,
        algorithm=algorithm,
        log=log,
        start_step=start_step,
        total_steps=total_steps,
        config_text="[algo]\nbeta = 0.1\n",
        is_main=is_main,
    )


def run_steps(run_dir, first, last, loss=0.5, **options):
    recorder = start(run_dir, start_step=first - 1, **options)
    for step in range(first, last + 1):
        recorder.step({"step": step, "loss": loss + step})
    recorder.close()


def rows(run_dir):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def scalars(run_dir, tag):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_row_is_on_disk_when_step_returns(tmp_path):
    recorder = start(tmp_path)
    recorder.step({"step": 1, "loss": 0.25, "num_tokens": 7, "grad_norm": np.float32(0.5)})
    assert rows(tmp_path) == [{"step": 1, "loss": 0.25, "num_tokens": 7, "grad_norm": 0.5}]
    recorder.close()


def test_values_that_are_no_numbers_become_null(tmp_path):
    recorder = start(tmp_path)
    recorder.step({"step": 1, "loss": math.nan, "grad_norm": math.inf, "mfu": None})
    recorder.close()
    assert rows(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "mfu": None}]


def test_unknown_metric_names_the_nearest(tmp_path):
    recorder = start(tmp_path)
    with pytest.raises(ValueError, match="'los' is not a known metric; did you mean 'loss'"):
        recorder.step({"step": 1, "los": 1.0})
    with pytest.raises(ValueError, match="has no step"):
        recorder.step({"loss": 1.0})
    recorder.close()
    assert rows(tmp_path) == []


def test_every_metric_of_every_algorithm_has_a_tag():
    for name in typing.get_args(TYPES["algo.name"]):
        algorithm = build_algorithm(AlgoConfig(name=name))
        assert {*algorithm.metric_names, algorithm.count_name} <= set(TAGS)


def test_resume_takes_back_later_rows(tmp_path):
    run_steps(tmp_path, 1, 6)
    run_steps(tmp_path, 4, 5, loss=100)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert [row["loss"] for row in rows(tmp_path)] == [1.5, 2.5, 3.5, 104, 105]


@pytest.mark.parametrize("torn", [b'{"step": 4, "lo', b'{"step": 4}x', b"\x00\x00", b'{"lo'])
def test_a_torn_last_row_is_dropped(tmp_path, torn):
    run_steps(tmp_path, 1, 3)
    with (tmp_path / "metrics.jsonl").open("ab") as stream:
        stream.write(torn)
    run_steps(tmp_path, 4, 4)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_a_whole_last_row_without_its_newline_stays(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 9}')
    run_steps(tmp_path, 2, 2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_other_ranks_write_nothing(tmp_path):
    run_steps(tmp_path / "run", 1, 2, is_main=False, log=LogConfig())
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_every_metric_under_its_tag(tmp_path):
    record = {name: 0.5 + i for i, name in enumerate(TAGS)}
    recorder = start(tmp_path, log=LogConfig(progress=False), algorithm="sft")
    recorder.step({"step": 3, **record, "mfu": None})
    recorder.close()
    assert scalars(tmp_path, "sft/loss") == [(3, 0.5)]
    assert scalars(tmp_path, "perf/tokens_per_s_per_gpu") == [(3, record["tokens_per_s_per_gpu"])]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = {tag.format(algo="sft") for name, tag in TAGS.items() if name != "mfu"}
    assert set(events.Tags()["scalars"]) == expected
    (text_tag,) = events.Tags()["tensors"]
    assert text_tag.startswith("config/toml")
    assert b"beta = 0.1" in events.Tensors(text_tag)[0].tensor_proto.string_val[0]


def test_tensorboard_forgets_steps_that_are_done_again(tmp_path):
    with_tensorboard = LogConfig(progress=False)
    run_steps(tmp_path, 1, 6, log=with_tensorboard)
    run_steps(tmp_path, 4, 5, loss=100, log=with_tensorboard)
    expected = [(1, 1.5), (2, 2.5), (3, 3.5), (4, 104.0), (5, 105.0)]
    assert scalars(tmp_path, "dpo/loss") == expected


def test_tensorboard_can_be_left_out(tmp_path):
    run_steps(tmp_path, 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_plain_lines_for_the_first_the_last_and_every_nth_step(tmp_path, caplog):
    log = LogConfig(tensorboard=False, progress=False, every_steps=4)
    with caplog.at_level(logging.INFO, "nova_sys"):
        run_steps(tmp_path, 3, 10, log=log)
    shown = [message.split()[1] for message in caplog.messages]
    assert shown == ["3/10", "4/10", "8/10", "10/10"]
    assert caplog.messages[0] == "step 3/10  loss 3.5000"


def test_the_bar_shows_progress_and_values_on_a_terminal(tmp_path, monkeypatch, caplog):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(telemetry, "console", lambda: terminal)
    recorder = start(tmp_path, log=LogConfig(tensorboard=False))
    record = {"loss": 0.6931, "margin": -0.25, "reward_accuracy": None, "pairs_per_s": 1234.5}
    with caplog.at_level(logging.INFO, "nova_sys"):
        recorder.step({"step": 2, **record, "peak_gib": 1.5, "tokens_per_s": 99999.0})
        recorder.close()
    assert "2/10" in screen.getvalue() and "ETA" in screen.getvalue()
    values = "loss 0.6931  margin -0.250  99,999 tok/s  1,234.5 pairs/s  1.50 GiB"
    assert values in screen.getvalue()
    assert caplog.messages == []


def test_histograms_are_read_back(tmp_path):
    recorder = start(tmp_path, log=LogConfig(progress=False))
    values = np.array([0.25, 0.25, 0.75, -1.5], np.float32)
    recorder.step({"step": 1})
    recorder.step({"step": 2}, {"kv_shift/k_previous": values})
    recorder.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["histograms"] == ["kv_shift/k_previous"]
    (event,) = events.Histograms("kv_shift/k_previous")
    seen = event.histogram_value
    assert (event.step, seen.num, seen.min, seen.max) == (2, 4, -1.5, 0.75)
    assert seen.sum == pytest.approx(-0.25)
    assert rows(tmp_path) == [{"step": 1}, {"step": 2}]
