"""Files from the Hugging Face hub: the cache first, then the network, and a quick answer when there is none."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError

from adaptkit.errors import BackboneError

TIMEOUT_S = 5.0


def fetch(name: str, repo: str, filenames: tuple[str, ...]) -> Path:
    """The local path of the first of `filenames` that `repo` (`org/name` or `org/name@revision`) has.

    A cached file is used without asking the network. Otherwise one request without retries finds out whether the
    hub can be reached, because the download's own retries take most of a minute. Raises `BackboneError`.
    """
    repo_id, _, revision = repo.partition("@")
    for filename in filenames:
        try:
            return Path(hf_hub_download(repo_id, filename, revision=revision or None, local_files_only=True))
        except (OSError, ValueError):  # not cached, or not a name the hub accepts: the request below says which
            continue
    reason = "no such file"
    for filename in filenames:
        try:
            get_hf_file_metadata(hf_hub_url(repo_id, filename, revision=revision or None), timeout=TIMEOUT_S)
            return Path(hf_hub_download(repo_id, filename, revision=revision or None, etag_timeout=TIMEOUT_S))
        except EntryNotFoundError:
            continue
        except Exception as error:  # the client's HTTP library, and with it the family of errors, has changed twice
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            break
    raise BackboneError(
        f"{_short(name, 45)}: {filenames[0]} is not cached, nor to be had from the hub ({_short(reason, 80)}); "
        "give --weights FILE, or name a local folder"
    )


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
