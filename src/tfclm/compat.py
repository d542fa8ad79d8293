"""Private API."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import subprocess
import sys


def import_tensorflow() -> None:
    """Imports TensorFlow for a command: without the lines in which it announces itself, which would bury ours."""
    # Its modules and graphs are millions of objects that stay, and the collector would walk them time and again.
    gc.set_threshold(200_000, 20, 100)
    # Or it would import Keras 3 beside tf_keras.
    os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
    # Where PyTorch is installed, transformers would import it, which some of its versions do not survive (triton).
    os.environ.setdefault("USE_TORCH", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.stderr.flush()
    terminal = os.dup(2)
    # In another process, because this one may be aborted while TensorFlow is imported, having said why.
    read, write = os.pipe()
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", _RELAY], stdin=read, stderr=terminal) as relay:
        os.close(read)
        os.dup2(write, 2)
        os.close(write)
        try:
            importlib.import_module("tensorflow")
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            # It ends with its input, unless a process that TensorFlow started still holds that.
            with contextlib.suppress(subprocess.TimeoutExpired):
                relay.wait(timeout=5)
            relay.kill()


# Copies stderr but for what TensorFlow says of itself: informational lines begin with I and a date, and another line
# says that they are not in the log file yet.
_RELAY = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
for line in sys.stdin.buffer:
    if not line.startswith((b"I0000", b"WARNING: All log messages before absl")):
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
"""
