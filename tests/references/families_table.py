"""Writes the table of model types in docs/reference/compatibility.md from families.json, which `make families` makes.

python tests/references/families_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

OUTCOMES = Path(__file__).with_name("families.json")
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "compatibility.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
# Column titles, by check.
TITLES = {
    "loads": "loads without PyTorch",
    "learns": "fit lowers the perplexity",
    "resumes": "resumes",
    "greedy": "exported greedy = `generate` = PyTorch's",
    "tokenizer": "tokenizer exact",
    "pytorch_4": "opens in PyTorch, transformers {pytorch_4}",
    "pytorch_5": "opens in PyTorch, transformers {pytorch_5}",
}


def render(outcomes: dict[str, Any]) -> str:
    """The Markdown: a tick for each check that passed, and the number of a sentence for the others."""
    versions, sentences = outcomes["versions"], list[str]()

    def cell(outcome: bool | str) -> str:
        if outcome is True:
            return "✓"
        if outcome not in sentences:
            sentences.append(str(outcome))
        return f"({sentences.index(str(outcome)) + 1})"

    titles = ["type", *(title.format(**versions) for title in TITLES.values())]
    rows = [
        [f"`{model_type}`", *(cell(checks.get(check, "Not run.")) for check in TITLES)]
        for model_type, checks in outcomes["types"].items()
    ]
    lines = [f"| {' | '.join(row)} |" for row in [titles, *rows]]
    table = "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]])
    notes = "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))
    made = ", ".join(f"{name} {version}" for name, version in versions.items() if not name.startswith("pytorch"))
    return f"{table}\n\n{notes}\n\nMade with {made}.\n"


def insert(page: str, table: str) -> str:
    """The page with this table in place of the one that it has."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Updates the page."""
    table = render(json.loads(OUTCOMES.read_text(encoding="utf-8")))
    PAGE.write_text(insert(PAGE.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
