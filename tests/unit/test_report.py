"""The demo's scores, its choice of samples, and the picture and table it makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from nova_sys.demo import SAMPLES_PER_TASK, sample_places, score
from nova_sys.report import draw_report, print_report, read_metrics, running_mean

PROMPTS = ["47+38=", "41+38=", "sort 7 3 9 3", "sort 2 1 3", "reverse a p q r s", "reverse a b c"]
RIGHT = ["85", "79", "3 3 7 9", "1 2 3", "s r q p a", "c b a"]
HABITUAL = ["75", "79", "3 7 9", "1 2 3", "s r q a p", "c b a"]


def _report() -> dict:
    before = score(PROMPTS, HABITUAL) | {"prefers_chosen": 0.5}
    after = score(PROMPTS, RIGHT) | {"prefers_chosen": 0.9, "reward_accuracy": 0.95, "margin": 2.0}
    samples = [{"prompt": "47+38=", "right": "85", "sft": "75", "dpo": "[85]"}]
    seconds = {"data": 1.0, "sft": 100.0, "dpo": 50.0, "evaluation": 9.0}
    return {
        **{"num_eval": 6, "sft": before, "dpo": after, "samples": samples, "seed": 0},
        **{"seconds": seconds, "seconds_total": 160.0},
    }


def _write_metrics(run_dir: Path, **columns: list[float]) -> None:
    run_dir.mkdir()
    rows = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_score_of_right_and_of_habitual_answers() -> None:
    best = score(PROMPTS, RIGHT)
    assert (best["accuracy"], best["tempting"], best["not_tempting"], best["habitual"]) == (
        1,
        1,
        1,
        0,
    )
    assert best["by_task"] == {"add": 1.0, "sort": 1.0, "reverse": 1.0}
    worst = score(PROMPTS, HABITUAL)
    assert (worst["accuracy"], worst["tempting"], worst["not_tempting"]) == (0.5, 0, 1)
    assert worst["habitual"] == 0.5
    one_wrong = score(PROMPTS, [*RIGHT[:-1], "c a b"])
    assert one_wrong["by_task"] == {"add": 1.0, "sort": 1.0, "reverse": 0.5}
    assert (one_wrong["not_tempting"], one_wrong["habitual"]) == (pytest.approx(2 / 3), 0)


def test_samples_are_the_first_tempting_prompts_of_each_task() -> None:
    many = ["41+38=", *(f"{n}9+1=" for n in range(1, 6)), *PROMPTS]
    chosen = [many[i] for i in sample_places(many)]
    assert chosen == ["19+1=", "29+1=", "sort 7 3 9 3", "reverse a p q r s"]
    assert SAMPLES_PER_TASK == 2


def test_running_mean_keeps_lines_straight_and_smooths_noise() -> None:
    line = [0.5 * step for step in range(200)]
    assert running_mean(line)[:190] == pytest.approx(line[:190])
    assert running_mean(line)[-1] == pytest.approx(line[-1], abs=2)  # no neighbours behind it
    noise = np.random.default_rng(0).normal(size=2000)
    smooth = np.array(running_mean(noise.tolist()))
    assert len(smooth) == 2000 and smooth[100:-100].std() < 0.25 * noise.std()
    assert running_mean([3.0]) == [3.0]


def test_metrics_are_columns_that_every_line_has(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    _write_metrics(run_dir, step=[1, 2], loss=[0.5, 0.25])
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 0.125, "mfu": 0.1, "margin": null}\n')
    assert read_metrics(run_dir) == {"step": [1, 2, 3], "loss": [0.5, 0.25, 0.125]}


def test_picture_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = list(range(1, 51))
    falling = [3.0 / step for step in steps]
    sft = {"step": steps, "loss": falling}
    rewards = {"chosen_reward": falling, "rejected_reward": [-x for x in falling]}
    dpo = {"step": steps, "loss": falling, "reward_accuracy": [0.5] * 50, **rewards}
    draw_report(tmp_path / "report.png", _report(), sft, dpo)
    image = imread(tmp_path / "report.png")
    assert image.shape[0] > 500 and image.shape[1] > 800
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 100  # not an empty page

    print_report(_report(), tmp_path)
    printed = capsys.readouterr().out
    assert "+50.0" in printed  # all tasks: 50% to 100%
    assert "95.0%" in printed and "47+38=" in printed
    assert "[85]" in printed  # an answer is not taken for markup
    assert "2.7 minutes" in printed
