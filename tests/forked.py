"""Python programs in processes of their own that have TensorFlow imported already, which takes most of a start."""

from __future__ import annotations

import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
SECONDS = 600  # after which a program is killed


def run(program: str, *arguments: object, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """What a program leaves that got these arguments, this standard input and these environment variables.

    tfclm and transformers are imported in its process, too: a program that must do without them needs a Python of its
    own.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [str(argument) for argument in arguments]
        process = FORKS.Process(target=_run, args=(program, words, stdin, environment, folder))
        process.start()
        process.join(SECONDS)
        process.kill()  # if it has not ended
        process.join()
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        assert process.exitcode is not None
        return subprocess.CompletedProcess(words, process.exitcode, out, err)


def _run(program: str, arguments: list[str], stdin: str, environment: dict[str, str], folder: str) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY), descriptor)
    os.environ.update(environment)
    sys.stdin, sys.argv = io.StringIO(stdin), ["program", *arguments]
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)
