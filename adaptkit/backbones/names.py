"""From what a user types to an `Origin`: which architecture, with which arguments, and where its weights are."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import timm
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model

from adaptkit.aliases import ALIASES, NANO, Alias
from adaptkit.backbones.config import read_config
from adaptkit.backbones.hub import fetch
from adaptkit.errors import BackboneError, did_you_mean

HUB = ("hf-hub:", "hf_hub:")
NANO_LICENCE = "research use, see its model card"
NANO_FOLDER = Path(__file__).parent.parent / "assets" / "nano"


@dataclass(frozen=True)
class Origin:
    """What timm needs to build the backbone, and where the pretrained weights are, if anywhere."""

    name: str
    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    global_pool: str | None = None  # as a saved folder states it beside its arguments
    folder: Path | None = None
    hub_repo: str | None = None
    hub_filename: str | None = None
    url: str | None = None  # of weights that are elsewhere
    image_px: int | None = None  # where it is to differ from what `pretrained_cfg` says

    @property
    def is_described(self) -> bool:
        """Whether a `config.json`, which may come from anyone, says what it is."""
        return self.folder is not None or self.name.startswith(HUB)

    def weights(self) -> Path:
        """The local path of the weights, downloaded if need be. Raises `BackboneError`."""
        if self.folder is not None:
            return _weights_in(self.folder)
        if self.hub_repo is None and self.url:
            raise BackboneError(f"{self.name}: its weights are not on the hub; fetch {self.url}, give --weights FILE")
        if self.hub_repo is None:
            raise BackboneError(
                f"{self.name}: timm has no pretrained weights for it on the hub; "
                "give --weights FILE, or --no-pretrained to start from random weights"
            )
        return fetch(self.name, self.hub_repo, _hub_filenames(self.hub_filename))


def backbone_names() -> list[str]:
    """`nano`, the aliases and every timm name with pretrained weights on the hub, in this order."""
    return [row[0] for row in backbone_rows()]


def backbone_rows(pattern: str | None = None) -> list[tuple[str, str, int, str]]:
    """(name, timm name, image_px, licence or "") of all that can be loaded by name, without building a network.

    `nano` first, then the aliases, then timm's names. `pattern` is a glob or a part of either name; case is ignored.
    """
    architecture, _, cfg, _ = read_config(NANO_FOLDER / "config.json", NANO)
    rows = [(NANO, architecture, int(cfg["input_size"][-1]), NANO_LICENCE)]
    rows += [_row(name, alias.timm_name, alias.image_px) for name, alias in ALIASES.items()]
    rows += [_row(name, name) for name in timm.list_pretrained() if get_pretrained_cfg(name).hf_hub_id]
    if pattern is None:
        return rows
    wanted = pattern.lower()
    glob = wanted if any(char in wanted for char in "*?[") else f"*{wanted}*"
    return [row for row in rows if any(fnmatchcase(name.lower(), glob) for name in row[:2])]


def _row(name: str, timm_name: str, image_px: int | None = None) -> tuple[str, str, int, str]:
    cfg = get_pretrained_cfg(timm_name)
    return name, timm_name, image_px or cfg.input_size[-1], cfg.license or ""


def find(name: str) -> Origin:
    """The origin of `nano`, an alias, a timm name, `hf-hub:org/name` or a local folder. Raises `BackboneError`.

    Names come before folders: write `./resnet18` for a folder called like an architecture.
    """
    if name == NANO:
        if not (NANO_FOLDER / "config.json").is_file():
            raise BackboneError("nano: the packaged backbone is missing from this installation; reinstall adaptkit")
        return _from_folder(name, NANO_FOLDER)
    source, colon, rest = name.partition(":")
    if name.startswith(HUB):
        config = read_config(fetch(name, rest, ("config.json",)), name)
        return Origin(name, *config, hub_repo=rest)
    if colon and source == "local-dir":
        return _from_folder(name, Path(rest))
    alias = ALIASES.get(name, Alias(name))
    if not any(char in name for char in "/\\") and is_model(alias.timm_name):
        return _from_timm(name, alias)
    if os.path.isdir(name):  # unlike Path.is_dir it answers for overlong names too
        return _from_folder(name, Path(name))
    if any(char in name for char in "/\\"):
        raise BackboneError(f"{name}: no such folder; for a repository of the hub write hf-hub:{name}")
    hint = did_you_mean(name, [NANO, *ALIASES, *timm.list_models(), *timm.list_pretrained()])
    raise BackboneError(
        f"unknown backbone {name[:80]!r}{hint}; see `adaptkit backbones`, or give hf-hub:org/name or a local folder"
    )


def _from_timm(name: str, alias: Alias) -> Origin:
    timm_name = alias.timm_name
    architecture, _, tag = timm_name.partition(".")
    try:
        cfg = get_pretrained_cfg(timm_name)
    except (RuntimeError, ValueError, KeyError):
        cfg = None
    if cfg is None and tag:
        known = timm.list_pretrained(f"{architecture}.*")
        hint = did_you_mean(timm_name, known)
        raise BackboneError(f"{name}: timm has no weights {tag!r} for {architecture}{hint} (has: {', '.join(known)})")
    cfg = cfg or PretrainedCfg()
    # A subset of the fields only: `to_dict` would drop those that are None, which some entry points rely on.
    fields = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    return Origin(
        name,
        architecture,
        {"global_pool": alias.global_pool} if alias.global_pool else {},
        fields,
        hub_repo=cfg.hf_hub_id,
        hub_filename=cfg.hf_hub_filename,
        url=cfg.url or None,
        image_px=alias.image_px,
    )


def _from_folder(name: str, folder: Path) -> Origin:
    if not os.path.isfile(folder / "config.json"):
        raise BackboneError(f"{folder}: no config.json; a backbone folder has config.json and model.safetensors")
    return Origin(name, *read_config(folder / "config.json", str(folder)), folder=folder)


def _weights_in(folder: Path) -> Path:
    for filename in ("model.safetensors", "pytorch_model.bin"):
        if (folder / filename).is_file():
            return folder / filename
    raise BackboneError(f"{folder}: no model.safetensors; export the backbone again or give --weights FILE")


def _hub_filenames(filename: str | None) -> tuple[str, ...]:
    if filename is None:
        return ("model.safetensors", "pytorch_model.bin")
    if filename == "open_clip_pytorch_model.bin":
        return ("open_clip_model.safetensors", filename)
    return (filename,)
