"""`load_backbone`: from a name, a folder or a module to a `Backbone` whose weights fit strictly."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from adaptkit.backbones.backbone import Backbone, Channels
from adaptkit.backbones.build import build, embed_dim
from adaptkit.backbones.checkpoints import fit_
from adaptkit.backbones.limits import MAX_NUMBERS, RESAMPLED
from adaptkit.backbones.module import from_module, module_name
from adaptkit.backbones.names import find
from adaptkit.backbones.reading import read_weights
from adaptkit.errors import BackboneError


def load_backbone(
    name: str | nn.Module,
    *,
    weights: str | None = None,
    pretrained: bool = True,
    readout: str = "auto",
    image_px: int | None = None,
    allow_missing: tuple[str, ...] = (),
    drop_path: float = 0.0,
    seed: int = 0,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> Backbone:
    """The backbone `name` in float32 and evaluation mode, on the CPU.

    `name` is `nano`, an alias (`dino_vits16`), a timm name, `hf-hub:org/name` or a local folder; `weights` a file
    that replaces its weights. `readout` is `auto` (the backbone's own), `cls`, `mean` or `pool`. With another readout
    than its own a ViT keeps its final norm where it was trained: `mean` of a `cls` backbone averages the normalised
    patch tokens (DINOv2's `x_norm_patchtokens`), so that no parameter is new. `image_px` resamples position
    embeddings; the aliases of DINOv2 take 224 px, as torch.hub's are used, though trained at 518. `drop_path` is
    never exported; `pretrained=False` draws by `seed`.

    `name` may also be a module, (N, 3, H, W) -> (N, D), which is copied and never changed. timm's lose their
    classifier; the output of any other is the embedding. `image_px`, `mean` and `std` say what images it takes
    (224 and ImageNet's unless given or known to timm). May raise `BackboneError`.
    """
    if isinstance(name, nn.Module):
        if weights is not None or not pretrained:
            raise BackboneError(
                f"{module_name(name)}: brings its own weights; load others into it, or draw it anew, before"
            )
        return from_module(name, readout=readout, image_px=image_px, mean=mean, std=std, drop_path=drop_path)
    if weights is not None and not pretrained:
        raise BackboneError(f"{weights}: weights are given and pretrained weights are switched off; keep one of them")
    if mean is not None or std is not None:
        raise BackboneError(f"{name}: mean and std are its own; they can be given for a module only")
    origin = find(name)
    content, most = None, MAX_NUMBERS
    if pretrained:
        path = Path(weights) if weights is not None else origin.weights()
        content, sha256 = read_weights(path)
        if not allow_missing:  # more parameters than bytes cannot all be in the file
            most = min(most, path.stat().st_size + RESAMPLED)
    backbone = build(origin, readout, image_px, drop_path, seed, most)
    if content is not None:
        backbone.load_report = fit_(
            backbone.module,
            content,
            architecture=backbone.architecture,
            source=str(path),
            sha256=sha256,
            allow_missing=allow_missing,
        )
    backbone.embed_dim = embed_dim(backbone)
    return backbone
