"""The layers of the package: commands import cli and rooms, rooms import rooms below them and leaves, no circles."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import tfclm

SOURCE = Path(tfclm.__file__).parent
COMMANDS = {"fit", "prepare", "launch", "evaluate", "generate", "export", "serve", "query", "push"}
LEAVES: dict[str, set[str]] = {
    "errors": set(),
    "settings": set(),
    "terminal": {"errors"},
    "disk": set(),
    "compat": set(),
}
# The rooms that each room may import, in addition to the leaves.
ROOMS: dict[str, set[str]] = {
    "corpus": set(),
    "metrics": set(),
    "client": set(),
    "server": set(),
    "models": set(),
    "checkpoint": {"models"},
    "training": {"corpus", "metrics"},
    "runs": {"metrics", "training"},
    "savedmodel": {"checkpoint", "models"},
    "hub": {"checkpoint", "runs", "savedmodel"},
    "cli": {"corpus", "metrics", "checkpoint", "training", "runs", "savedmodel", "hub"},
}
# The same name in several rooms, which mirror each other there.
MIRRORED = {"__init__", "messages", "rest", "rpc", "settings"}


def modules() -> dict[str, ast.Module]:
    """Every module by its name within the package; a package by its folder's."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module, known: Mapping[str, ast.Module], *, typing: bool) -> Iterator[str]:
    """The modules of the package that a module imports, in functions too; `typing`: also for its annotations alone."""
    skipped = set()
    if not typing:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tfclm":
            # `from tfclm.hub import repository` imports a module, `from tfclm.hub import push` what a package holds.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("tfclm.") in known else node.module for name in names]
        for name in names:
            if name.startswith("tfclm."):
                yield name.removeprefix("tfclm.")


def graph(*, typing: bool) -> dict[str, set[str]]:
    """What each module imports."""
    known = modules()
    # The package's own __init__ only names what the rooms hold, and __main__ starts commands by name.
    return {
        name: set(imports(tree, known, typing=typing)) - {name}
        for name, tree in known.items()
        if name not in ("", "__main__")
    }


def test_every_module_has_a_layer():
    """A new folder that no rule mentions, so that it may import anything."""
    assert {name.split(".")[0] for name in graph(typing=True)} == COMMANDS | LEAVES.keys() | ROOMS.keys()


def test_imports_go_down():
    """A room that imports a command, a leaf that imports a room, or a room that imports one above it."""
    wrong = []
    for name, imported in graph(typing=True).items():
        room = name.split(".")[0]
        if room in COMMANDS:
            allowed = LEAVES.keys() | ROOMS.keys()
        else:
            allowed = {room, *(LEAVES[room] if room in LEAVES else LEAVES.keys() | ROOMS[room])}
        wrong += [f"{name} imports {other}" for other in imported if other.split(".")[0] not in allowed]
    assert not wrong


def test_rooms_form_no_circle():
    """A rule above that allows two rooms to import each other."""
    done: list[str] = []
    while rest := ROOMS.keys() - done:
        free = sorted(room for room in rest if ROOMS[room] <= set(done))
        assert free, f"a circle among {sorted(rest)}"
        done += free


def test_modules_form_no_circle():
    """Two modules that need each other, of which neither can be read or imported alone."""
    found = graph(typing=False)
    state: dict[str, bool] = {}  # True: looked at, False: on the present path

    def visit(name: str, path: list[str]) -> None:
        if state.get(name):
            return
        assert name not in path, f"a circle: {' imports '.join([*path[path.index(name) :], name])}"
        for other in sorted(found.get(name, ())):
            visit(other, [*path, name])
        state[name] = True

    for name in sorted(found):
        visit(name, [])


def test_a_name_says_which_module():
    """Two modules of one name, of which a reader opens the wrong one."""
    seen: dict[str, list[str]] = {}
    for path in SOURCE.rglob("*.py"):
        seen.setdefault(path.stem, []).append(str(path.relative_to(SOURCE)))
    assert not {stem: places for stem, places in seen.items() if len(places) > 1 and stem not in MIRRORED}
