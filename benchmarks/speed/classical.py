"""The usual loop of self-distillation as a contestant, `python classical.py SETTING`: adaptkit's mathematics.

Written from the descriptions of DINO (arXiv 2104.14294) and SimDINO (arXiv 2502.10385): all augmentation on PIL images
in the loader's workers, float batches, one pass per crop, plain AdamW, an EMA parameter by parameter, the loss read at
every step. Networks, attention kernel, views, batch, objective and precision are those that adaptkit opens.
"""

from __future__ import annotations

import random
import sys

import torch
from ours import open_contest  # beside this file
from PIL import Image, ImageFilter
from setting import Setting
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms as T
from turns import Turns

from adaptkit.distill import balance_head_
from adaptkit.loading import start_worker
from adaptkit.objectives.objective import Losses
from adaptkit.session import Session
from adaptkit.settings import ViewSettings


class Blur:
    """Gaussian blur of a random radius, with probability `p`."""

    def __init__(self, p: float, sigma: tuple[float, float]) -> None:
        self.p, self.sigma = p, sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= self.p:
            return image
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*self.sigma)))


def view_transform(s: ViewSettings, view: int, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> T.Compose:
    """PIL image -> (3, side, side) float32, normalised. Global views are numbered first."""
    is_global = view < s.num_global
    return T.Compose(
        [
            T.RandomResizedCrop(
                side,
                scale=s.global_scale if is_global else s.local_scale,
                interpolation=T.InterpolationMode.BICUBIC,
            ),
            T.RandomHorizontalFlip(s.hflip),
            T.RandomApply([T.ColorJitter(s.brightness, s.contrast, s.saturation, s.hue)], p=s.jitter),
            T.RandomGrayscale(s.grey),
            Blur(s.blur[min(view, 1) if is_global else 2], s.blur_sigma),
            T.ToTensor(),
            T.Normalize(mean, std),
        ]
    )


class ClassicalViews(Dataset[list[Tensor]]):
    """Image -> its V views, everything done here."""

    def __init__(self, s: Session) -> None:
        self.files = [s.source.file(index) for index in range(len(s.source))]
        v, crop = s.recipe.views, s.multicrop
        sides = [crop.global_px] * v.num_global + [crop.local_px] * v.num_local
        self.transforms = [
            view_transform(v, view, side, s.backbone.mean, s.backbone.std) for view, side in enumerate(sides)
        ]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        with Image.open(self.files[index]) as file:
            image = file.convert("RGB")
        return [transform(image) for transform in self.transforms]


def classical_loader(s: Session) -> DataLoader[list[Tensor]]:
    """Batches of V tensors (n, 3, side, side), without the end of an epoch, where workers would start again."""
    images = ClassicalViews(s)
    return DataLoader(
        images,
        batch_size=s.recipe.batch_size,
        sampler=RandomSampler(images, replacement=True, num_samples=s.plan.total_steps * s.recipe.batch_size),
        num_workers=s.workers,
        worker_init_fn=start_worker,
        pin_memory=s.accelerator.device.type == "cuda",
        drop_last=True,
    )


def classical_losses(s: Session, crops: list[Tensor], step: int) -> Losses:
    """V crops (n, 3, side, side) -> losses: every crop by itself through student, every global one through teacher."""
    student, teacher = s.student, s.teacher
    with torch.autocast(crops[0].device.type, torch.bfloat16, enabled=s.recipe.precision == "bf16"):
        with torch.no_grad():
            outputs = [teacher.head(teacher.backbone(crop)) for crop in crops[: s.recipe.views.num_global]]
        logits = torch.stack([student.head(student.backbone(crop)) for crop in crops]).float()  # (V, n, B)
    targets = torch.stack(outputs).float()  # (G, n, B)
    if s.objective.balance == "always":
        medians = targets.flatten(0, 1).median(0).values
        targets = balance_head_(student, teacher, targets, medians, fresh=False)
    return s.objective(logits, targets, step)


def main(setting: Setting) -> None:
    """Train until the referee ends the process."""
    turns = Turns()
    s = open_contest(setting)
    s.student.train()
    optimizer = torch.optim.AdamW(s.student.parameters(), lr=s.recipe.optim.lr)
    for step, batch in enumerate(classical_loader(s)):
        optimizer.param_groups[0]["lr"] = s.plan.lr(step)
        losses = classical_losses(s, [crop.to(s.accelerator.device, non_blocking=True) for crop in batch], step)
        optimizer.zero_grad()
        losses.loss.backward()
        torch.nn.utils.clip_grad_norm_(s.student.parameters(), s.recipe.optim.clip_norm)
        optimizer.step()
        momentum = s.plan.momentum(step)
        with torch.no_grad():
            for mine, theirs in zip(s.teacher.parameters(), s.student.parameters(), strict=True):
                mine.mul_(momentum).add_((1 - momentum) * theirs)
        losses.loss.item()  # read for the log, as usual
        turns.step_done()


if __name__ == "__main__":
    main(Setting.from_text(sys.argv[1]))
