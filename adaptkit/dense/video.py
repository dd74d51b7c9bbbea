"""Video objects followed from their first masks alone: J and F of masks that patch tokens carry from frame to frame."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adaptkit.backbones import Backbone
from adaptkit.dense.masks import IGNORED, check_size, read_mask
from adaptkit.dense.overlap import contour_f, region_j
from adaptkit.dense.pairs import SUFFIXES, listed
from adaptkit.dense.propagation import first_shares, object_numbers, propagate
from adaptkit.dense.tokens import TokenReader, Tokens
from adaptkit.errors import DataError, MachineError, UsageError
from adaptkit.probes.measure import Measurement
from adaptkit.probes.score import Score, whole_score
from adaptkit.sources.source import shown

FRAMES, ANNOTATIONS, NAMES = Path("JPEGImages/480p"), Path("Annotations/480p"), Path("ImageSets/2017/val.txt")
SHORT_SIDE = 480  # px: larger frames are made smaller
MIN_FRAMES = 3  # the first is given, the last is not scored


@dataclass(frozen=True)
class Video:
    """T frames and as many masks; those of the first tell the objects."""

    name: str
    frames: Sequence[Path]
    masks: Sequence[Path]
    objects: NDArray[np.uint8]  # (O,) their numbers in the masks, ascending


def measure(
    backbone: Backbone,
    data: Path,
    queries: Path | None,
    *,
    seed: int,
    precision: str,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> Measurement:
    """`video_jf`, `video_j` and `video_f`, percent: means over objects of their means over frames.

    `data` is laid out as DAVIS 2017 (see `open_videos`). As in its semi-supervised evaluation the first and the last
    frame are not scored. Nothing is fitted or drawn, so `seed` changes nothing. `queries` must be None. Raises
    `DataError`, `BackboneError`, `UsageError`.
    """
    if queries is not None:
        raise UsageError("video: nothing is fitted, so there are no queries apart from the data; leave --queries out")
    videos = open_videos(data)
    reader = TokenReader(backbone, SHORT_SIDE, precision, batch_size, workers, device)
    per_video: list[NDArray[np.float64]] = []
    with reader.ready():
        seen = reader([frame for video in videos for frame in video.frames[:-1]])
        for video in videos:
            per_video.append(follow(video, islice(seen, len(video.frames) - 1)))
    return Measurement(
        {
            "video_jf": mean_score([shares.mean(axis=1) for shares in per_video]),
            "video_j": mean_score([shares[:, 0] for shares in per_video]),
            "video_f": mean_score([shares[:, 1] for shares in per_video]),
        }
    )


def mean_score(per_video: Sequence[NDArray[np.float64]]) -> Score:
    """Shares of the objects of each video -> their mean over all objects, percent.

    Its interval draws videos, not objects: those of one video share their frames.
    """
    return whole_score(
        lambda drawn: float(100 * np.concatenate([per_video[video] for video in drawn]).mean()), len(per_video)
    )


def follow(video: Video, frames: Iterator[Tokens]) -> NDArray[np.float64]:
    """Tokens of all frames but the last -> (O, 2): J and F of each object, means over frames without the first."""
    start = next(frames)
    given = read_mask(video.masks[0])
    check_size(given, video.masks[0], start.size, video.frames[0])
    shares = first_shares(given, video.objects, *start.grid.shape[:2]).to(start.grid.device)
    per_frame = []
    carried = propagate(_grids(video, start, frames), shares)
    for file, frame, found in zip(video.masks[1:-1], video.frames[1:-1], carried, strict=True):
        truth = read_mask(file)
        check_size(truth, file, start.size, frame)
        per_frame.append(score_frame(object_numbers(found, start.size), truth, video.objects))
    mean: NDArray[np.float64] = np.mean(per_frame, axis=0)
    return mean


def score_frame(found: NDArray[np.int64], truth: NDArray[np.uint8], objects: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(H, W) positions of `object_numbers` and (H, W) numbers -> (O, 2) J and F of each object."""
    regions = [(found == position, truth == number) for position, number in enumerate(objects, start=1)]
    return np.array([(region_j(ours, theirs), contour_f(ours, theirs)) for ours, theirs in regions])


def _grids(video: Video, start: Tokens, frames: Iterator[Tokens]) -> Iterator[Tensor]:
    yield start.grid
    for file, frame in zip(video.frames[1:], frames, strict=False):
        if frame.size != start.size:
            raise DataError(
                f"{shown(file)}: is {frame.size[1]} x {frame.size[0]} px, the first frame {start.size[1]} x "
                f"{start.size[0]}; the frames of a video have one size"
            )
        yield frame.grid


def open_videos(data: Path) -> list[Video]:
    """The videos of a folder laid out as DAVIS 2017.

    JPEGImages/480p/NAME/*.jpg and Annotations/480p/NAME/*.png, frame by frame in order of the file names, with object
    numbers (0 and 255 are none); ImageSets/2017/val.txt names the videos, else all that have annotations are taken.
    Raises `DataError` naming the first offender.
    """
    if os.path.isfile(data / NAMES):
        names = _listed_names(data / NAMES)
    else:
        names = [name for name in listed(data / ANNOTATIONS) if os.path.isdir(data / ANNOTATIONS / name)]
    if not names:
        raise DataError(f"{shown(data)}: no video; it needs {FRAMES}/NAME/*.jpg and {ANNOTATIONS}/NAME/*.png")
    return [_open_video(data, name) for name in dict.fromkeys(names)]


def _listed_names(file: Path) -> list[str]:
    try:
        names = file.read_text(encoding="utf-8", errors="replace").split()
    except OSError as error:
        raise MachineError(f"{shown(file)}: cannot be read ({error.strerror}); check its permissions") from None
    if wrong := next((name for name in names if name != os.path.basename(name) or name in (".", "..")), None):
        raise DataError(f"{shown(file)}: {shown(wrong)} is no name of a folder; list one folder of {FRAMES} a line")
    return names


def _open_video(data: Path, name: str) -> Video:
    folder = data / FRAMES / name
    frames = [folder / file for file in listed(folder) if _is_picture(file, SUFFIXES)]
    masks = {Path(file).stem for file in listed(data / ANNOTATIONS / name) if _is_picture(file, (".png",))}
    if len(frames) < MIN_FRAMES:
        raise DataError(f"{shown(folder)}: {len(frames)} frames; at least {MIN_FRAMES} are needed")
    files = [data / ANNOTATIONS / name / f"{frame.stem}.png" for frame in frames]
    for frame, file in zip(frames[:-1], files, strict=False):
        if frame.stem not in masks:
            raise DataError(f"{shown(frame)}: has no mask {shown(file)}; add it, or leave the video out")
    numbers = np.unique(read_mask(files[0]))
    objects = numbers[(numbers != 0) & (numbers != IGNORED)]
    if not len(objects):
        raise DataError(f"{shown(files[0])}: no object in the first mask, so there is nothing to follow")
    return Video(name, frames, files, objects)


def _is_picture(name: str, suffixes: Sequence[str]) -> bool:
    return name.lower().endswith(tuple(suffixes)) and not name.startswith(".")
