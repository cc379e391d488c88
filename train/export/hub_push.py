"""A folder as a repository on the Hugging Face hub, in one commit."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import HfApi, errors, get_token
from huggingface_hub.utils import validate_repo_id

from data_prep.shard_format.hub import require_hub
from train.errors import UserError, one_line

FAILURES = (errors.HTTPError, OSError, errors.HFValidationError)
"""The first is that of the HTTP library, whose name changes with the client's version."""


def require_push(name: str) -> None:
    """UserError where nothing could be pushed: an ill name, no token, no hub; before minutes of work."""
    try:
        validate_repo_id(name)
    except errors.HFValidationError as error:
        raise UserError(f"--push {name}: {one_line(error)}; give OWNER/NAME, or NAME for your own") from None
    if get_token() is None:
        raise UserError(f"--push {name}: no token; `hf auth login`, or set HF_TOKEN to one that may write")
    require_hub(f"--push {name}")


def push_folder(folder: Path, name: str, private: bool) -> str:
    """Upload all files of a folder; the repository is made where there is none.

    Returns:
        The repository's address.
    Raises:
        UserError: the hub refuses; or `private` is asked of a repository that is public.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(address.repo_id).private:
            raise UserError(
                f"--private: {address} exists and is public; nothing was pushed; give another name"
            )
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Model exported by Halfling"
        )
    except FAILURES as error:
        raise UserError(
            f"{folder} is written, and was not pushed to {name}: {one_line(error)}; try again with "
            f"`hf upload {name} {folder}`"
        ) from error
    return str(address)
