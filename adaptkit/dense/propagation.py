"""Masks carried through a video by the nearest neighbours of patch tokens, without any training.

The protocol of DINO (Caron et al. 2021, section 4.2.2), which is that of Jabri et al. 2020 (space-time correspondence
as a contrastive random walk) with the first frame and the last seven as context.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

LAST_FRAMES = 7  # beside the first one
TOP_K = 5
TEMPERATURE = 0.1
RADIUS = 12  # patches, to each side


def propagate(
    frames: Iterator[Tensor],
    first: Tensor,
    *,
    last_frames: int = LAST_FRAMES,
    top_k: int = TOP_K,
    temperature: float = TEMPERATURE,
    radius: int = RADIUS,
) -> Iterator[Tensor]:
    """(h, w, D) tokens of each frame and (h, w, C) shares of the objects in the first -> the shares in each later one.

    A patch takes the shares of the `top_k` patches whose tokens have the largest cosine with its own, out of those at
    most `radius` rows and columns away in the first frame and the `last_frames` before it, weighted by the softmax of
    cosine / temperature.
    """
    start = F.normalize(next(frames), dim=-1)
    recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=last_frames)
    for frame in frames:
        tokens = F.normalize(frame, dim=-1)
        context = torch.stack([start, *(seen for seen, _ in recent)])  # (K, h, w, D)
        shares = torch.stack([first, *(given for _, given in recent)])  # (K, h, w, C)
        rows = [
            _row(tokens[y], _near(context, y, radius), _near(shares, y, radius), top_k, temperature, radius)
            for y in range(len(tokens))  # one at a time: all pairs of patches would take gigabytes
        ]
        carried = torch.stack(rows)
        yield carried
        recent.append((tokens, carried))


def _near(maps: Tensor, row: int, radius: int) -> Tensor:
    """(K, h, w, ...) -> the rows at most `radius` away."""
    return maps[:, max(row - radius, 0) : row + radius + 1]


def _row(tokens: Tensor, context: Tensor, shares: Tensor, top_k: int, temperature: float, radius: int) -> Tensor:
    """(w, D) tokens of one row, (K, rows, w, D) and (K, rows, w, C) -> (w, C) its shares."""
    width = len(tokens)
    cosines = torch.einsum("wd,krvd->wkrv", tokens, context)
    columns = torch.arange(width, device=tokens.device)
    is_far = (columns[:, None] - columns).abs() > radius  # (w, v)
    cosines = cosines.masked_fill(is_far[:, None, None], -torch.inf).flatten(1)
    best, where = cosines.topk(min(top_k, cosines.shape[1]))
    weights = (best / temperature).softmax(dim=1)
    return torch.einsum("wn,wnc->wc", weights, shares.flatten(0, 2)[where])


def first_shares(mask: NDArray[np.uint8], objects: NDArray[np.uint8], rows: int, columns: int) -> Tensor:
    """(H, W) object numbers -> (rows, columns, 1 + objects), 1 for what the middle of a patch shows; 0 is the rest."""
    height, width = mask.shape
    down, right = (
        ((np.arange(count) + 0.5) * side / count).astype(np.int64) for side, count in ((height, rows), (width, columns))
    )
    seen = mask[down[:, None], right]
    which = np.where(np.isin(seen, objects), 1 + np.searchsorted(objects, seen), 0)
    return F.one_hot(torch.from_numpy(which), 1 + len(objects)).float()


def object_numbers(shares: Tensor, size: tuple[int, int]) -> NDArray[np.int64]:
    """(h, w, C) shares -> (H, W): 0 or 1 + the position of the object.

    Drawn out bilinearly; as in DINO each map is then stretched to 0..1, so that a small object can win.
    """
    maps = F.interpolate(shares.permute(2, 0, 1)[None], size=size, mode="bilinear", align_corners=False)[0]
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    maps = torch.where(high > low, (maps - low) / (high - low).clamp(min=1e-12), maps)
    return maps.argmax(dim=0).cpu().numpy()
