"""What rank 0 says, what the other ranks keep to themselves, and Megatron-core's silence."""

from __future__ import annotations

import subprocess
import sys

import pytest

SPEAK = """
import logging, sys, warnings
from nova_sys.log import setup_logging
setup_logging(int(sys.argv[1]))
setup_logging(int(sys.argv[1]))
logging.getLogger("nova_sys.trainer").info("step [1] of /a/path")
logging.getLogger("nova_sys.trainer").warning("careful " + "x" * 200)
logging.getLogger("someone.else").info("chatter")
logging.getLogger("someone.else").warning("their warning")
logging.getLogger("someone.else").error("their error")
warnings.warn("a python warning")
"""

IMPORT_MEGATRON = """
from nova_sys.log import setup_logging
setup_logging(0)
import megatron.core.models.gpt.gpt_layer_specs
import megatron.core.models.gpt.gpt_model
import megatron.core.optimizer
import megatron.core.distributed
import megatron.core.dist_checkpointing
"""


def stderr_of(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    return finished.stderr


def test_rank_0_tells_the_story():
    lines = [line.partition(" ")[2] for line in stderr_of(SPEAK, "0").splitlines()]
    assert lines[:4] == [
        "step [1] of /a/path",
        "careful " + "x" * 200,  # one message, one line
        "their warning",
        "their error",
    ]
    assert "UserWarning: a python warning" in lines[4]


def test_other_ranks_only_speak_up_on_trouble():
    lines = [line.partition(" ")[2] for line in stderr_of(SPEAK, "3").splitlines()]
    assert lines == ["[rank 3] careful " + "x" * 200, "[rank 3] their error"]


def test_megatron_core_is_imported_in_silence():
    pytest.importorskip("megatron.core")
    assert stderr_of(IMPORT_MEGATRON) == ""
