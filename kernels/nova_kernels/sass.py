"""Reading the machine code of a Hopper kernel: what stands in it, how often, and in which order."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

# ptxas: a message about wgmma that it serialised (C7510, C7512), spills, and the like.
WARNING = re.compile(r"warning|\(C75\d\d\)", re.IGNORECASE)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);")


def cuobjdump(option: str, path: Path) -> str:
    """What `cuobjdump` prints. It comes with the CUDA toolkit and with Triton.

    Raises: FileNotFoundError where neither is.
    """
    program = shutil.which("cuobjdump")
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:  # made for the newest code Triton makes
        program = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if program is None:
        raise FileNotFoundError("cuobjdump: install the CUDA toolkit or Triton")
    done = subprocess.run([program, option, path], capture_output=True, text=True, check=True)
    return done.stdout


def instructions(sass: str) -> list[str]:
    """One line per instruction, without predicate and address, as `cuobjdump -sass` shows it."""
    return [match[1] for match in map(_INSTRUCTION.match, sass.splitlines()) if match]


def mnemonic(instruction: str) -> str:
    """WARPGROUP.DEPBAR, a wait, is not WARPGROUP.ARRIVE; all other modifiers go."""
    name = instruction.split()[0]
    return ".".join(name.split(".")[: 2 if name.startswith("WARPGROUP") else 1])
