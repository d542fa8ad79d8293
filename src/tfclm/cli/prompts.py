"""The prompts of a command: from its flags, a file or standard input."""

from __future__ import annotations

import re
from typing import TextIO

from tfclm.errors import InputError


def read_prompt(prompt: str | None, stdin: TextIO | None, file: str | None = None) -> str:
    """The prompt that is given, else the file's or standard input's without the newline that editors put at the end.

    Raises:
        InputError: it is not UTF-8, the file or standard input cannot be read or is closed (None), or both are given.
    """
    if prompt is not None and file is not None:
        raise InputError("--prompt and --prompt-file exclude each other: give one of them")
    given = "--prompt" if prompt is not None else "standard input" if file is None else f"--prompt-file {file}"
    try:
        if prompt is not None:
            prompt.encode()  # fails where the shell's bytes were no text, which Python hands on as surrogates
            return prompt
        if file is None:
            if stdin is None:
                raise InputError("standard input is closed: give --prompt")
            content = stdin.buffer.read()
        else:
            with open(file, "rb") as opened:
                content = opened.read()
        return re.sub(r"\r?\n\Z", "", content.decode())
    except UnicodeError as error:
        raise InputError(f"{given} is not UTF-8: give the prompt as UTF-8 (iconv -t UTF-8 converts it)") from error
    except OSError as error:
        raise InputError(f"{given}: {error.strerror or error}") from error
