"""The prompts of a command: from its flags, a file or standard input."""

from __future__ import annotations

import re
from typing import TextIO

from tfclm.errors import InputError


def read_prompt(prompt: str | None, stdin: TextIO | None, file: str | None = None) -> str:
    """The given prompt, or the text of the file or of standard input without the newline that editors add at the end.

    Raises:
        InputError: it is not UTF-8, the file or standard input cannot be read or is closed, or two are given.

    Example:
        >>> read_prompt("The import statement", sys.stdin)
        'The import statement'
    """
    if prompt is not None and file is not None:
        raise InputError("`prompt` and `prompt_file` are mutually exclusive: give one of them")
    given = "`prompt`" if prompt is not None else "standard input" if file is None else f"`prompt_file` {file}"
    try:
        if prompt is not None:
            prompt.encode()  # fails if the shell passed bytes that are not text: Python turns them into surrogates
            return prompt
        if file is None:
            if stdin is None:
                raise InputError("standard input is closed: give `prompt`")
            content = stdin.buffer.read()
        else:
            with open(file, "rb") as opened:
                content = opened.read()
        return re.sub(r"\r?\n\Z", "", content.decode())
    except UnicodeError as error:
        raise InputError(f"{given} is not UTF-8: give the prompt as UTF-8 (iconv -t UTF-8 converts it)") from error
    except OSError as error:
        raise InputError(f"{given}: {error.strerror or error}") from error
