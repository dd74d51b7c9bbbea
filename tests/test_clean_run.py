"""What a run leaves outside its directory, and whom it calls: nothing, and nobody."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from tiny_runs import ROOT, command, flags

ASSETS = ROOT / "adaptkit" / "assets"
NO_NETWORK = """
import os, socket

def refuse(*where, **options):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(f"{where}\\n")
    raise OSError("no network here")

class Socket(socket.socket):
    def connect(self, address):
        return super().connect(address) if self.family == socket.AF_UNIX else refuse(address)
    def connect_ex(self, address):
        return super().connect_ex(address) if self.family == socket.AF_UNIX else refuse(address)

socket.socket, socket.getaddrinfo, socket.create_connection = Socket, refuse, refuse
"""


def left_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


@pytest.mark.long
def test_a_run_writes_only_into_its_directory_and_calls_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, that is: importing torch leaves an empty folder `torchinductor_USER`. With a loader process."""
    data, code, calls = tmp_path / "images", tmp_path / "code", tmp_path / "calls"
    watched = {name: tmp_path / name for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR", "XDG_CONFIG_HOME", "here")}
    for folder in (data, code, *watched.values()):
        folder.mkdir()
    for path in sorted((ASSETS / "eurosat").glob("*.jpg"))[:60]:
        shutil.copy(path, data)
    (code / "sitecustomize.py").write_text(NO_NETWORK)
    monkeypatch.chdir(watched.pop("here"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(code), os.environ.get("PYTHONPATH", "")]))
    for name in [name for name in os.environ if name.startswith(("HF_", "TORCH", "TRITON", "MPL", "TEMP", "TMP"))]:
        monkeypatch.delenv(name)
    variables = {name: str(folder) for name, folder in watched.items()} | {"CALLS": str(calls)}
    settings = flags({"steps": 2, "workers": 1, "batch_size": 4, "views.num_local": 0})
    words = ("adapt", "--backbone", "nano", "--data", data, "--output", tmp_path / "run", *settings)
    done = command(*words, timeout=300, **variables)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.json").is_file()
    assert {name: left_in(folder) for name, folder in watched.items()} == {name: [] for name in watched}
    assert left_in(Path.cwd()) == []
    assert len(left_in(data)) == 60
    assert not calls.exists(), calls.read_text()
