"""Upload of a folder with a student and its card to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distill.extras import import_extra
from distill.types import DistillError

EXTRA = "hub"


def hub_client() -> Any:
    """A client of the Hub, which finds the user's token itself.

    Raises:
        DistillError: huggingface_hub is not installed.
    """
    return import_extra("huggingface_hub", EXTRA, "--push-to-hub").HfApi()


def push_folder(folder: Path, name: str, client: Any) -> str:
    """Create a model repository if it does not exist, and upload a folder. Returns its address.

    Args:
        folder: the folder.
        name: ``USER/NAME``.
        client: see `hub_client`.

    Raises:
        DistillError: the upload failed. The message has the Hub's reason.
    """
    try:
        address = client.create_repo(name, repo_type="model", exist_ok=True)
        client.upload_folder(repo_id=name, repo_type="model", folder_path=str(folder))
    except Exception as error:  # the client's errors have no common class
        raise DistillError(
            f"--push-to-hub {name}: {error}. The folder {folder} is complete; log in ('hf auth login'), and try again"
        ) from error
    return str(address)
