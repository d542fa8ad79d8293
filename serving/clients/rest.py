"""Generates over REST with requests; prints the text: rest.py [URL [MODEL [PROMPT]]]."""

from __future__ import annotations

import sys
from typing import Any

import requests


def main(url: str = "http://localhost:8501", model: str = "quickstart", prompt: str = "The import statement") -> None:
    """Sends one row. It names every input: REST knows no defaults."""
    row = {
        "prompt": prompt,
        "max_new_tokens": 20,
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
        "repetition_penalty": 1.0,
        "seed": 7,
        "stop": "",
    }
    body: dict[str, Any] = {"signature_name": "generate", "instances": [row]}
    # 5 s to connect, 120 s for the reply.
    reply = requests.post(f"{url}/v1/models/{model}:predict", json=body, timeout=(5, 120))
    if not reply.ok:
        sys.exit(f"HTTP {reply.status_code}: {reply.text}")
    print(reply.json()["predictions"][0]["generated_text"])


if __name__ == "__main__":
    main(*sys.argv[1:])
