"""A web page on which to try a model, `playground.html`: one file, which calls this server or another one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

__all__ = ["Playground"]

_MODEL_NAMES = 'id="served">[]<'


class Playground:
    """The page and its HTTP headers; `names` returns the names of the models that are served."""

    def __init__(self, names: Callable[[], list[str]]) -> None:
        page = (Path(__file__).parent / "playground.html").read_text(encoding="utf-8")
        self._names = names
        self._before, self._after = page.split(_MODEL_NAMES)
        # Only the page's own script and style may run, not what generated text may contain; it may call any server.
        policy = ["default-src 'none'", "connect-src *", "img-src data:"]
        policy += ["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
        for kind in ("script", "style"):
            (content,) = re.findall(f"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
            policy.append(f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'")
        self.headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": "; ".join(policy),
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    def page(self) -> bytes:
        """The page, with the names of the models that are served now."""
        names = json.dumps(self._names()).replace("<", "\\u003c")
        return f"{self._before}{_MODEL_NAMES.replace('[]', names)}{self._after}".encode()
