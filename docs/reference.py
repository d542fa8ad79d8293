"""A hook of MkDocs that writes the reference from the code, and takes in the pages that live elsewhere.

The commands come from `tfclm.__main__`, their flags from the settings dataclasses, the public names from
`tfclm.__all__`: a page written by hand would become outdated.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import tfclm
from tfclm.__main__ import COMMANDS
from tfclm.cli.arguments import table

ROOT = Path(__file__).parent.parent
# A page of the site -> a file of the repository that is read on its own, too.
ELSEWHERE = {
    "reference/serving.md": "serving/README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
# Further public names: the steps from text to blocks, the settings of an export, the Hub's callback.
FURTHER = [
    "tfclm.corpus.read",
    "tfclm.corpus.tokenize",
    "tfclm.savedmodel.settings.ServableSettings",
    "tfclm.hub.PushToHubCallback",
]

# Functions with the name of their module: mkdocstrings would document the module instead.
SHADOWED = {"tfclm.perplexity": "tfclm.metrics.perplexity.perplexity"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages to those that are written."""
    pages = {"reference/commands.md": commands(), "reference/api.md": api()}
    pages |= {page: adopted(ROOT / source) for page, source in ELSEWHERE.items()}
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def commands() -> str:
    """A section for every command: what it does, and a table of its flags."""
    parts = [
        "# Commands",
        "`tfclm fit` and `python -m tfclm.fit` are the same command, and so are the others. Every flag is also a key "
        "of the YAML file that `--config` names; flags override the file. A flag may be written with hyphens or with "
        "underscores. A flag whose default is `True` or `False` takes no value and has a `--no-` form.",
    ]
    for verb, about in COMMANDS.items():
        settings = getattr(importlib.import_module(f"tfclm.{verb}"), f"{verb.capitalize()}Settings")
        parts += [f"## `{verb}` {{ #{verb} }}", f"`python -m tfclm.{verb}`: {about}.", table(settings)]
    return "\n\n".join(parts)


def api() -> str:
    """An entry for every public name; settings are shown as a table of their fields."""
    parts = [
        "# Python API",
        "`import tfclm` imports neither TensorFlow nor transformers; a name is loaded when it is first used.",
    ]
    for path in [*(f"tfclm.{name}" for name in tfclm.__all__), *FURTHER]:
        module, _, name = path.rpartition(".")
        # The others are read from the source alone: importing them would import TensorFlow.
        if name.endswith("Settings"):
            value = getattr(importlib.import_module(module), name)
            about = (value.__doc__ or "").partition("\n")[0]
            fields = re.sub(r"`--([a-z-]+)`", lambda flag: f"`{flag[1].replace('-', '_')}`", table(value))
            fields = fields.replace("| flag |", "| field |", 1)
            parts += [f"### `{name}` {{ #{path} }}", f"`{path}`: {about}", fields]
        else:
            # A callback's hooks and attributes are for Keras, not for readers.
            options = "\n    options:\n      members: [close]" if name.endswith("Callback") else ""
            parts += [f'<a id="{path}"></a>', f"::: {SHADOWED.get(path, path)}{options}"]
    return "\n\n".join(parts)


def adopted(path: Path) -> str:
    """A page of the repository, with its links to files, which are no part of the site, as their names."""
    folder = path.parent.relative_to(ROOT)

    def named(link: re.Match[str]) -> str:
        return link[0] if re.match(r"\w+:|#", link[2]) else f"`{(folder / link[2]).as_posix()}`"

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", named, path.read_text(encoding="utf-8"))
