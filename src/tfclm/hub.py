"""Publishing to the Hugging Face Hub: the check before training, and transformers' callback."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from tfclm.errors import InputError


def preflight(repo_id: str) -> str:
    """Checks, before any training, that a run can push to a Hub repository, and makes the repository if need be.

    Returns:
        The repository's full name.

    Raises:
        InputError: the name is not valid, no token, one that is refused or may not write there, no git or git-lfs, no
            Hub within reach.
    """
    import requests
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repo_id}: {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise InputError("--push-to-hub needs the Hub, and HF_HUB_OFFLINE is set: unset it, or push later")
    for program in ("git", "git-lfs"):
        if shutil.which(program) is None:
            raise InputError(
                f"--push-to-hub needs {program}, which is not installed: install your system's {program} package"
            )
    if get_token() is None:
        raise InputError("--push-to-hub needs a token: run `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        user = api.whoami()["name"]
        repo_id = repo_id if "/" in repo_id else f"{user}/{repo_id}"
        api.create_repo(repo_id, exist_ok=True)
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = {401: "the token is not valid", 403: f"the token may not write to {repo_id}"}.get(status, str(error))
        raise InputError(f"--push-to-hub {repo_id}: {reason} (the Hub answered {status})") from error
    except (requests.RequestException, OfflineModeIsEnabled) as error:
        raise InputError(f"--push-to-hub {repo_id}: the Hub at {constants.ENDPOINT} cannot be reached") from error
    return repo_id


def push_callback(repo_id: str, tokenizer: Any, folder: Path) -> Any:
    """transformers' `PushToHubCallback`: pushes model and tokenizer after every epoch from a clone in `folder`."""
    from transformers import PushToHubCallback

    # git would otherwise wait at the terminal for a name and a password.
    os.environ.setdefault("GIT_TERMINAL_PROMPT", "0")
    return PushToHubCallback(output_dir=folder, tokenizer=tokenizer, hub_model_id=repo_id, save_strategy="epoch")
