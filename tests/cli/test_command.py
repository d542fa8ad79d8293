"""Running a command: how signals end it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from tfclm.cli.command import sigterm_interrupts


def test_sigterm_interrupts_this_process():
    """A command that SIGTERM ends by the signal, without a line; or a handler that stays when the command has ended."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_ends_processes_that_were_forked(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """A traceback from every worker process of datasets when its pool ends it."""
    # Else tokenizers warns of the fork if an earlier test has used its threads.
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    context = multiprocessing.get_context("fork")
    started = context.Event()

    def sleep() -> None:
        started.set()
        time.sleep(60)

    with sigterm_interrupts():
        process = context.Process(target=sleep)
        process.start()
        assert started.wait(60)
        process.terminate()
        process.join(60)
    assert process.exitcode == -signal.SIGTERM
    assert capfd.readouterr() == ("", "")
