"""A model on the Hugging Face Hub -> a directory in its local cache, by huggingface_hub.

Only what a checkpoint needs is asked for, by name: weights as safetensors, config, tokenizer, chat template. Never Python
files, pickles or other formats, and nothing from subdirectories. The library does the rest: resuming, the shared cache,
HF_TOKEN, HF_HUB_OFFLINE. Whatever goes wrong ends in one sentence that says what to do.
"""

from __future__ import annotations

import re
from pathlib import Path

from nanoserve.checks import shown
from nanoserve.errors import CheckpointError

WANTED = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.jinja",
]
# The patterns' * crosses directories. consolidated*: a second copy of the weights under other names (Mistral's own format).
NOT_WANTED = ["*/*", "consolidated*.safetensors"]
_REPO_ID = re.compile(r"(\b[\w\-.]{1,96}\b/)?\b[\w\-.]{1,96}\b", re.ASCII)
_FILE_SUFFIXES = (".safetensors", ".json", ".pt", ".pth", ".bin", ".gguf", ".git")


def is_repo_id(text: str) -> bool:
    """Whether `text` can name a model on the hub ("org/name" or "name") by the hub's own rules, and is not a file's name."""
    return bool(
        _REPO_ID.fullmatch(text)
        and "--" not in text
        and ".." not in text
        and not text.lower().endswith(_FILE_SUFFIXES)
    )


def download(repo_id: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The directory of a model's files, downloaded unless the cache has them.

    Args:
        repo_id: "org/name".
        revision: branch, tag or commit; None is the main branch.
        weights: False leaves the large files where they are.

    Raises:
        CheckpointError: huggingface_hub is not installed, no such model or revision, no access, or no connection.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(
            f"{repo_id}: no such directory here, and the hub needs huggingface_hub: pip install huggingface_hub, "
            "or give a local directory"
        ) from error
    wanted = WANTED if weights else [pattern for pattern in WANTED if pattern != "*.safetensors"]
    at = f"{repo_id} at revision {shown(revision)}" if revision else repo_id
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=wanted, ignore_patterns=NOT_WANTED
            )
        )
    except errors.GatedRepoError as error:
        reason = f"{repo_id}: access is restricted; accept its terms at huggingface.co/{repo_id}, then hf auth login or set HF_TOKEN"
        raise CheckpointError(reason) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{at}: the hub has the model but no such revision; give a branch, tag or commit of it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id}: neither a directory here nor a model the hub shows you; check the name, give a local "
            "directory, or, if it is private, hf auth login or set HF_TOKEN"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(_unreachable(at, partly=hasattr(error, "snapshot_path"))) from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{at}: not a name of the hub's; give org/name or a local directory") from error
    except Exception as error:  # the HTTP client's and the file system's own errors: many types, one meaning
        raise CheckpointError(
            f"{at}: the download failed ({type(error).__name__}: {shown(str(error))}); try again or give a local directory"
        ) from error


def _unreachable(at: str, partly: bool) -> str:
    from huggingface_hub import constants

    cached = "only partly in the local cache" if partly else "not in the local cache"
    if constants.HF_HUB_OFFLINE:
        return (
            f"{at}: no such directory here and {cached}, and HF_HUB_OFFLINE=1 forbids the download; "
            "unset it, or give a local directory"
        )
    return (
        f"{at}: no such directory here, {cached}, and the hub cannot be reached; connect, or give a local "
        "directory (HF_HUB_OFFLINE=1 serves what is cached without asking the hub)"
    )
