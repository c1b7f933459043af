"""Reads tokenizers in a process of its own: they are parsed by native code, which could take the process with it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

from nova_sys.data.tokenizer import load_tokenizer
from nova_sys.errors import is_user_error

LIMIT_S = 30
"""Per tokenizer."""
TEXTS = ["", " a  b", "2+2=4\n", "<s>x</s>", "\u2581\U0001f642 \0 e\u0301", "a" * 300]


class Reader:
    """A process that loads tokenizers and uses them; started again when one was too much for it."""

    process: subprocess.Popen[bytes] | None = None

    def judge(self, files: dict[str, bytes]) -> str:
        """`read` or `refused`; fails at anything else."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        process = self.process
        assert process.stdin and process.stdout
        timer = signal.signal(signal.SIGALRM, lambda *_: process.kill())
        signal.alarm(LIMIT_S)
        try:
            pickle.dump(files, process.stdin)
            process.stdin.flush()
            verdict = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            verdict = (
                f"the process ended with {process.wait()} (-9: it was stopped after {LIMIT_S} s)"
            )
            self.process = None
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, timer)
        assert verdict in ("read", "refused"), verdict
        return verdict

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


def verdict_on(files: dict[str, bytes], folder: Path) -> str:
    """`read` or `refused`, or else what went wrong."""
    for old in folder.iterdir():
        old.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    try:
        tokenizer = load_tokenizer(folder)
    except BaseException as error:
        ours = is_user_error(error) and str(folder) in str(error)
        return "refused" if ours else traceback.format_exc()
    try:
        for text in TEXTS:
            for continues in (False, True):
                ids, offsets = tokenizer.encode_with_offsets(text, continues=continues)
                assert all(0 <= i < tokenizer.vocab_size for i in ids), ids
                assert len(ids) == len(offsets) and all(0 <= b <= len(text) for _, b in offsets)
                tokenizer.decode(ids)
    except BaseException as error:
        return "refused" if is_user_error(error) else traceback.format_exc()
    return "read"


def serve() -> None:
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print
    with tempfile.TemporaryDirectory() as folder:
        while True:
            try:
                files = pickle.load(source)
            except EOFError:
                return
            pickle.dump(verdict_on(files, Path(folder)), sink)
            sink.flush()


if __name__ == "__main__":
    serve()
