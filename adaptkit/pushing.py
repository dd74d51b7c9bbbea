"""`adaptkit export --push-to-hub`: the backbone of a run and its model card as a repository of the Hugging Face hub."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from adaptkit.backbones.reading import line
from adaptkit.errors import MachineError, UsageError
from adaptkit.report import render_markdown
from adaptkit.report.card import public
from adaptkit.run import Run

SCHEMA = "adaptkit.push/1"


def push_run(run: str | Path, repo: str, *, private: bool = True) -> dict[str, Any]:
    """Upload the backbone of the finished run and its report as `README.md` to `repo` (`org/name`), made if need be.

    The card names no folder of this machine. The hub is the one of `HF_ENDPOINT`, the token what `hf auth login` left.
    Afterwards `timm.create_model("hf-hub:org/name", pretrained=True)` and `adaptkit ... --backbone hf-hub:org/name`
    load it. Raises `UsageError` for an unfinished run or a name the hub does not take, `MachineError` when the hub
    cannot be reached or refuses.
    """
    opened = Run.open(run)
    report = opened.read_json("report.json")
    if report is None:
        raise UsageError(f"{run}: has not finished; go on with `adaptkit resume {run}`")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"--push-to-hub {repo[:60]}: write ORG/NAME ({line(error, 100)})") from None
    with tempfile.TemporaryDirectory() as folder:
        _copy(opened.path / "backbone", Path(folder))
        (Path(folder) / "README.md").write_text(render_markdown(public(report), repo), encoding="utf-8")
        try:
            api = HfApi()
            url = api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"adaptkit: {report['verdict']}")
        except Exception as error:  # the client's HTTP library, and with it the family of errors, has changed twice
            advice = "log in with `hf auth login`, check name and network"
            raise MachineError(f"{repo}: not uploaded ({line(error, 140)}); {advice}") from error
    return {"schema": SCHEMA, "run": str(opened.path), "repo": repo, "url": str(url), "private": private}


def _copy(backbone: Path, folder: Path) -> None:
    try:
        shutil.copytree(backbone, folder, dirs_exist_ok=True)
    except FileNotFoundError:
        raise UsageError(f"{backbone}: is gone; run again, or push the folder where it is now by hand") from None
    except OSError as error:  # of several files at once `strerror` is None
        raise MachineError(f"{backbone}: cannot be copied to {folder} ({line(error, 140)}); check both disks") from None
