"""The private API of other libraries: all of it is there, and all of it is used through `tfclm.compat`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from grpc._cython import cygrpc

import tfclm
from tfclm import compat

SOURCE = Path(tfclm.__file__).parent
# What these packages document is imported from their top level, or from one of these.
DOCUMENTED = {"transformers.utils", "huggingface_hub.errors", "huggingface_hub.utils"}
PREFIXES = ("tensorflow.", "tf_keras.", "keras.", "transformers.", "huggingface_hub.")


@pytest.mark.parametrize("name", sorted(compat.PRIVATE_API))
def test_private_name_exists(name: str):
    """A version of one of these libraries that no longer has a name, found when a model is exported or pushed."""
    assert getattr(compat, name) is not None


def test_missing_name_is_an_error():
    """A misspelled name that is None."""
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = compat.absent


def imported(tree: ast.AST) -> list[str]:
    """The modules that a module imports from."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_private_api_is_imported_here_alone(path: Path):
    """A private module or attribute that is imported elsewhere, where no test notices that it was removed."""
    if path.name == "compat.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = [name for name in imported(tree) if name.startswith(PREFIXES) and name not in DOCUMENTED]
    internal = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "__internal__"]
    assert not modules + internal


def test_xla_cannot_be_turned_off(tmp_path: Path):
    """A build of TensorFlow in which the switch has another name, or is in another file, ending a server."""
    assert "no libtensorflow_cc" in str(compat.disable_xla(tmp_path))
    library = tmp_path / "libtensorflow_cc.so.2"
    library.write_bytes(b"no library")
    assert "too short" in str(compat.disable_xla(tmp_path))
    library.unlink()
    # A library that lacks the symbol.
    library.symlink_to(cygrpc.__file__)
    assert "DisableXlaCompilation" in str(compat.disable_xla(tmp_path))
