"""Builds the extensions in the source tree, unless those that are there were made of these sources: `python benchmarks/gpu_build.py`.

Beside the extensions it leaves the hash of what they were made of. So they can be built on a machine with nvcc and no GPU, with the Python of the
GPU machine, and be carried there; then this takes seconds. File times do not survive being carried, so they are not looked at.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kernels" / "nova_kernels"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
MADE_OF = PACKAGE / f"_C{SUFFIX}".replace(".so", ".sources")
LOADS = "\n".join(
    [
        "import importlib.machinery as m, importlib.util as u, sys",
        "for path in sys.argv[1:]:",
        "    loader = m.ExtensionFileLoader(path.rpartition('/')[2].partition('.')[0], path)",
        "    u.module_from_spec(u.spec_from_loader(loader.name, loader))",
    ]
)


def sources_hash() -> str:
    """Of everything that the extensions are made of, by name and content."""
    digest = hashlib.sha256()
    files = [ROOT / "CMakeLists.txt", ROOT / "setup.py"]
    files += sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    for path in files:
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def load_problem(extensions: list[Path]) -> str:
    """Why one of them does not load here; empty when all do. In a process of its own: a broken one may crash it."""
    missing = [path.name for path in extensions if not path.exists()]
    if missing:
        return f"not there: {', '.join(missing)}"
    command = [sys.executable, "-c", LOADS, *map(str, extensions)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip()[-500:] if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--again", action="store_true", help="build what is up to date, too")
    arguments = parser.parse_args()
    began_s, wanted = time.perf_counter(), sources_hash()
    extensions = [PACKAGE / f"{name}{SUFFIX}" for name in ("_C", "_C_cuda")]
    same = MADE_OF.exists() and MADE_OF.read_text().strip() == wanted
    problem = load_problem(extensions)
    built = arguments.again or not same or bool(problem)
    if built:
        MADE_OF.unlink(missing_ok=True)
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        command += ["--build-temp", f"build/gpu-check-{sys.implementation.cache_tag}"]
        subprocess.run(command, cwd=ROOT, check=True)
        problem = load_problem(extensions)
        if not problem:
            MADE_OF.write_text(wanted + "\n")
    seconds = round(time.perf_counter() - began_s, 1)
    record = {"built": built, "seconds": seconds, "sources": wanted, "problem": problem}
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))
    return int(bool(problem))


if __name__ == "__main__":
    sys.exit(main())
