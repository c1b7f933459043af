"""What `evaluate` and `generate` make of the configuration in a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from nova_sys import saved_config
from nova_sys.config import RunConfig
from nova_sys.config_io import check, config_from
from nova_sys.saved_config import EVALUATE, GENERATE, config_for

TRAINED = (
    'data.train="none"',
    "model.num_layers=6",
    "model.vocab_size=300",
    "train.recompute=full",
    "train.recompute_layers=2",
)


def test_recomputed_blocks_need_not_divide_other_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages of 3 layers, for a model trained on one stage in blocks of 2."""

    def saved(_: str | Path, overrides: Sequence[str]) -> tuple[Path, RunConfig]:
        return Path("step_1"), config_from([*TRAINED, *overrides], "config.toml")

    monkeypatch.setattr(saved_config, "checkpoint_config", saved)
    for command in (EVALUATE, GENERATE):
        _, config = config_for(command, "step_1", ["parallel.pipeline=2"], 2)
        assert config.train.recompute == "none"
    with pytest.raises(ValueError, match="recompute_layers = 2: must divide the 3 layers"):
        check(saved("step_1", ["parallel.pipeline=2"])[1], 2)  # a run would recompute
