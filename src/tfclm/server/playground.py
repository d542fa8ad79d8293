"""The page to try a model on, `playground.html`: one file, which asks this server or another one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

__all__ = ["Playground"]

_PLACE = 'id="served">[]<'


class Playground:
    """The page and the headers that it is sent with; `names` gives the names of the models that are served."""

    def __init__(self, names: Callable[[], list[str]]) -> None:
        page = (Path(__file__).parent / "playground.html").read_text(encoding="utf-8")
        self._names = names
        self._before, self._after = page.split(_PLACE)
        # The page's own script and style run, and nothing that a text may smuggle in; it may ask any server.
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
        """The page, with the models that are served now."""
        names = json.dumps(self._names()).replace("<", "\\u003c")
        return f"{self._before}{_PLACE.replace('[]', names)}{self._after}".encode()
