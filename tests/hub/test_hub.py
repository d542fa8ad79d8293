"""The Hub: the check before training, making a repository equal to a folder, and pushing through a bad network."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import FAULTS, PRELUDE, READER, Faults, Hub, asked, environment, filled, held, hub


@pytest.fixture(name="hub")
def hub_fixture() -> Iterator[Hub]:
    """A stand-in for the Hub, empty."""
    with hub() as running:
        yield running


PREFLIGHT = """
results = []
for name, options in CASES:
    try:
        results.append(preflight(name, **options).repo_id)
    except (InputError, Unreachable) as error:
        results.append(f"{type(error).__name__}: {error}")
answer(results)
"""


def test_preflight_names_what_is_wrong(hub: Hub, tmp_path: Path):
    """A run that trains for hours before it learns that it may not push, or one line that does not say why."""
    hub.make("models/me/public", {})
    hub.make("models/museum/old", {})
    cases: list[tuple[str, dict[str, Any], list[str]]] = [
        ("tiny", {}, ["me/tiny"]),
        ("me/tiny", {}, ["me/tiny"]),
        ("lab/tiny", {"private": True, "branch": "run-1"}, ["lab/tiny"]),
        ("lab/tiny", {"branch": "run-1"}, ["lab/tiny"]),
        ("me/public", {"create_pr": True, "token": READER}, ["me/public"]),
        ("a/b/c", {}, ["InputError", "`repo_id` a/b/c"]),
        ("me/tiny", {"token": "hf_" + "x" * 34}, ["InputError", "the token is not valid"]),
        ("me/tiny", {"token": READER}, ["InputError", "may only read"]),
        ("museum/tiny", {}, ["InputError", "the token of me may not write to museum/tiny"]),
        ("museum/old", {}, ["InputError", "the token of me may not write to museum/old"]),
        ("me/public", {"private": True}, ["InputError", "public", "`private`"]),
    ]
    code = f"CASES = {[(name, options) for name, options, _ in cases]!r}\n" + PREFLIGHT
    results, _ = asked(code, hub.endpoint, tmp_path / "none")
    for (name, options, words), result in zip(cases, results, strict=True):
        assert all(word in result for word in words), (name, options, result)
        assert "\n" not in result
        assert "hf_" not in result
    assert hub.model("lab/tiny").private
    assert not hub.model("me/tiny").private
    assert hub.model("lab/tiny").refs.keys() == {"main", "run-1"}
    assert "museum/tiny" not in {each.name for each in hub.repositories.values()}
    assert hub.large == {}, "asking whether it may write must leave nothing behind"


def test_preflight_without_token_or_hub(tmp_path: Path):
    """A traceback, or minutes of waiting, where there is no token or no way to the Hub."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        gone = f"http://127.0.0.1:{unused.getsockname()[1]}"
        (result,), _ = asked("CASES = [('me/x', {})]\n" + PREFLIGHT, gone, tmp_path / "none", token=None)
        assert result.startswith("InputError: `repo_id` me/x needs a token")
        code = "CASES = [('me/x', {'patience': 0.5})]\n" + PREFLIGHT
        (result,), _ = asked(code, gone, tmp_path / "none")
        assert result.startswith("Unreachable: me/x: the Hub at http://127.0.0.1")
        assert "cannot be reached" in result


MIRROR = """
results = []
repository = preflight("me/tiny", timeout=1.0, **OPTIONS)
for _ in range(2):
    results.append(repository.mirror(list_files(folder), "a title", "a text"))
answer(results)
"""


def test_repository_is_made_equal_to_the_folder(hub: Hub, tmp_path: Path):
    """Stale weights that stay next to new ones, a file that .gitignore keeps back, or a commit that changes nothing."""
    folder = filled(tmp_path / "run")
    stale = {"pytorch_model.bin": b"\0old", "config.json": b"old", "same.txt": b"same", ".gitignore": b"config.json"}
    hub.make("models/me/tiny", stale)
    (folder / "same.txt").write_text("same")
    results, _ = asked("OPTIONS = {}" + MIRROR, hub.endpoint, folder)
    assert results == [True, False]
    assert hub.model("me/tiny").files() == held(folder)
    # The first commit removes .gitignore, the second adds the files that it excluded.
    assert hub.model("me/tiny").titles() == ["content", "a title", "a title"]
    uploads = [request for request in hub.requests if request.startswith("PUT")]
    assert len(uploads) == 2, "of the two large files each goes once"


def test_branch_and_pull_request_leave_main_alone(hub: Hub, tmp_path: Path):
    """Weights on main that were meant for review, or a pull request for each push."""
    folder = filled(tmp_path / "run")
    asked("OPTIONS = {'branch': 'run-1'}" + MIRROR, hub.endpoint, folder)
    repository = hub.model("me/tiny")
    assert repository.files("run-1") == held(folder)
    hub.faults = Faults(["lost"], "/commit/main")  # opened, and the answer lost
    code = "OPTIONS = {'create_pr': True}" + MIRROR.replace("range(2)", "range(1)")
    failed = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, str(folder)],
        env=environment(hub.endpoint, tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert failed.returncode != 0
    (folder / "config.json").write_text("newer")
    asked("OPTIONS = {'create_pr': True}" + MIRROR, hub.endpoint, folder)
    assert [title for title, _ in repository.requests] == ["Upload by tfclm"]
    assert repository.files("refs/pr/1") == held(folder)
    assert repository.files() == {}


PUSH = """
FIRST_WAIT, TIMEOUT = 1.0, 1.0
repository = preflight("me/tiny", timeout=TIMEOUT)
said = []
pusher = Pusher(repository, "a request", said.append, first_wait=FIRST_WAIT)
def put(name, **more):
    (folder / "config.json").write_text(name)
    pusher.put(State(list_files(folder), name, **more))
began = time.monotonic()
"""


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (0, 2, 3))])
def test_push_goes_through_a_bad_network(hub: Hub, tmp_path: Path, seed: int):
    """A fault that ends the push, leaves half of it, or makes the commit twice; each kind, in an order by the seed."""
    folder = filled(tmp_path / "run")
    code = PUSH.replace("1.0, 1.0", "0.05, 1.0")
    hub.make("models/me/tiny", {"stale.bin": b"\0"})
    hub.faults = Faults.drawn(seed, "^(POST /api/models|POST /lfs|PUT|GET /api/models/me/tiny/tree)", hang=1.5)
    (error, said), _ = asked(f"{code}\nput('final')\nanswer([str(pusher.close(60)), said])", hub.endpoint, folder)
    assert error == "None", said
    assert set(hub.faults.met) == set(FAULTS), said
    assert hub.model("me/tiny").files() == held(folder)
    assert hub.model("me/tiny").titles() == ["content", "final"]
    assert any("trying again" in line for line in said)


def test_states_are_coalesced_and_the_newest_wins(hub: Hub, tmp_path: Path):
    """A queue that grows while the Hub is slow, a training that waits for it, or a last state that is left out."""
    folder = filled(tmp_path / "run")
    hub.make("models/me/tiny", {})
    hub.faults = Faults(["hang"], "/commit/", hang=0.9)
    code = f"""{PUSH}
put("first")
time.sleep(0.4)
for name in "bcdef":
    put(name)
handed_over = time.monotonic() - began
error = pusher.close(60)
answer([str(error), handed_over])
"""
    (error, seconds), _ = asked(code, hub.endpoint, folder)
    assert error == "None"
    assert seconds < 0.8, "handing over must not wait for the Hub"
    assert hub.model("me/tiny").titles() in (["f"], ["first", "f"])
    assert hub.model("me/tiny").files() == held(folder)


def test_waits_as_long_as_the_hub_asks(hub: Hub, tmp_path: Path):
    """Hammering a Hub that said when to come back (HTTP 429 with Retry-After)."""
    folder = filled(tmp_path / "run")
    hub.make("models/me/tiny", {})
    hub.faults = Faults(["429", "429"], "/commit/")
    code = PUSH.replace("1.0, 1.0", "0.05, 1.0")
    code += "put('a')\nerror = pusher.close(60)\nanswer([str(error), time.monotonic() - began])"
    (error, seconds), _ = asked(code, hub.endpoint, folder)
    assert error == "None"
    assert seconds > 1.9, "a second each time, where the own back-off is short"
    assert hub.model("me/tiny").titles() == ["a"]


@pytest.mark.parametrize("header", ["3600", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT", "Mon, 99 Foo", "²"])
def test_a_wait_that_the_hub_asks_for_has_an_end(hub: Hub, tmp_path: Path, header: str):
    """A finished run that waits for an hour, past its own patience, as a server says; or a header that ends it."""
    folder = filled(tmp_path / "run")
    hub.make("models/me/tiny", {})
    hub.faults = Faults(["429"], "/commit/", retry_after=header)
    code = PUSH.replace("1.0, 1.0", "0.05, 30.0")
    code += """
put('first')
while not said: time.sleep(0.01)
put('second')
began = time.monotonic()
error = pusher.close(0, drop=True)
dropped = time.monotonic() - began
pusher = Pusher(repository, "a request", said.append, first_wait=0.05)
put('last')
error = pusher.close(5)
answer([str(error), dropped, time.monotonic() - began, said])
"""
    # One that cannot be read is none.
    readable = not header.startswith(("Mon", "²"))
    (error, dropped, seconds, said), _ = asked(code, hub.endpoint, folder)
    assert dropped < 30
    assert seconds < 60
    assert len(said) == 1
    if readable:
        assert "asks to wait for another 3" in error, "nobody asks a Hub again that has asked for an hour"
        assert hub.model("me/tiny").titles() == []
    else:
        assert error == "None", said
        assert hub.model("me/tiny").titles()[-1] == "last"


def test_a_newer_state_waits_as_the_hub_has_asked(hub: Hub, tmp_path: Path):
    """A Hub that is asked again at once, because the state that it turned away was overtaken or another pusher's."""
    folder = filled(tmp_path / "run")
    hub.make("models/me/tiny", {})
    hub.faults = Faults(["429"], "/commit/", retry_after="3")
    code = f"""{PUSH}
put('first')
while not said: time.sleep(0.01)
turned_away = time.monotonic()
put('second')
pusher.close(0, drop=True)
pusher = Pusher(repository, "a request", said.append)
put('last')
error = pusher.close(30)
answer([str(error), time.monotonic() - turned_away])
"""
    (error, seconds), _ = asked(code, hub.endpoint, folder)
    assert error == "None"
    assert 2.5 < seconds < 20
    assert hub.model("me/tiny").titles() == ["last"]


def test_every_request_has_a_time_limit(hub: Hub, tmp_path: Path):
    """A check before training that waits for ever: the client passes its calls on with a time limit of None."""
    hub.make("models/me/tiny", {})
    hub.faults = Faults(["hang"] * 3, "GET /api/models/me/tiny", hang=60.0)
    code = "began = time.monotonic()\nCASES = [('me/tiny', {'timeout': 0.5, 'patience': 1.0})]\n" + PREFLIGHT.replace(
        "answer(results)", "answer([results, time.monotonic() - began])"
    )
    ((result,), seconds), _ = asked(code, hub.endpoint, tmp_path / "none")
    assert result.startswith("Unreachable"), result
    assert seconds < 20


def test_a_push_whose_thread_fails_is_no_success(hub: Hub, tmp_path: Path):
    """A repository that is said to hold the folder, because the thread that pushed ended in an error of its own."""
    hub.make("models/me/tiny", {})
    code = f"""{PUSH}
def full(line): raise OSError(28, "No space left on device")
repository.token = None
pusher = Pusher(repository, "a request", full)
pusher.put(State({{"a": folder / "gone"}}, "title"))
answer(type(pusher.close(5)).__name__)
"""
    error, _ = asked(code, hub.endpoint, filled(tmp_path / "run"))
    assert error == "OSError"


def test_a_hub_that_never_answers_is_given_up(hub: Hub, tmp_path: Path):
    """A push that waits for ever on a connection where nothing comes: requests that write have no time limit."""
    folder = filled(tmp_path / "run")
    hub.make("models/me/tiny", {})
    hub.faults = Faults(["hang"], "/commit/", hang=60.0)
    code = f"{PUSH}\nput('a')\nerror = pusher.close(60)\nanswer([str(error), time.monotonic() - began])"
    (error, seconds), _ = asked(code, hub.endpoint, folder)
    assert error == "None"
    assert seconds < 20
    assert hub.model("me/tiny").titles() == ["a"]


def test_gives_up_when_its_time_is_over_or_there_is_no_use(hub: Hub, tmp_path: Path):
    """A process that never ends because the Hub does not come back, or that retries after a refusal."""
    folder = filled(tmp_path / "run")
    hub.make("models/me/tiny", {})
    hub.faults = Faults(["500"] * 100, "/commit/")
    code = PUSH.replace("1.0, 1.0", "1.0, 30.0")
    code += "put('a')\nerror = pusher.close(5)\nanswer([str(error), time.monotonic() - began, said])"
    (error, seconds, said), _ = asked(code, hub.endpoint, folder)
    assert "500" in error
    assert seconds < 30
    assert len(said) == 1, "one line a state, not one an attempt"
    hub.faults = Faults()
    code = code.replace('preflight("me/tiny", timeout=TIMEOUT)', f'Repository("me/tiny", token="{READER}")')
    code = code.replace("close(5)", "close(90)")
    (error, seconds, said), _ = asked(code, hub.endpoint, folder)
    assert "403" in error
    assert seconds < 60, "less than its time, which retries would use up"
    assert "You don't have the rights to write here" in said[0]
    assert hub.model("me/tiny").titles() == []


def test_a_resumed_run_does_not_push_an_existing_state(hub: Hub, tmp_path: Path):
    """After a kill: the commits of the first process once more, and the Hub back at an older state."""
    folder = filled(tmp_path / "run")
    for run, steps in (("abc", 100), ("abc", 200), ("abc", 100), ("abc", 200), ("abc", 300), ("xyz", 100)):
        put = f"put('{run} {steps}', run='{run}', steps={steps}, description='run {run}, step {steps}')"
        result, _ = asked(f"{PUSH}\n{put}\nanswer(str(pusher.close(60)))", hub.endpoint, folder)
        assert result == "None"
    assert hub.model("me/tiny").titles() == ["abc 100", "abc 200", "abc 300", "xyz 100"]
