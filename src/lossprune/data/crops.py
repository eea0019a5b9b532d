"""Windows of photographs: at random for training, the centre for evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

AREA = 0.08  # the least share of the image
RATIO = 4 / 3  # the most that width and height may differ by


@dataclass(frozen=True)
class Centre:
    """Cuts the middle ``side`` × ``side`` pixels out of every image."""

    side: int

    def to(self, device: torch.device) -> Centre:
        """Return this: there is nothing to move."""
        return self

    def __getitem__(self, part: slice) -> Centre:
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Cut ``images`` (n, channels, height, width), without a copy."""
        top, left = ((size - self.side) // 2 for size in images.shape[2:])
        return images[:, :, top : top + self.side, left : left + self.side]


@dataclass(frozen=True)
class RandomWindows:
    """A random window of each of n images, brought to one size, and a random flip.

    Its share of the image is uniform in [0.08, 1], and the logarithm of width / height in
    ±log(4/3); where a side would be longer than the image, it is as long as the image.  Every
    place is equally likely.  Source: Szegedy et al., "Going deeper with convolutions", 2015.

    In the coordinates of ``torch.nn.functional.grid_sample``, where an image reaches from −1 to 1,
    the window is ``centre`` ± ``half``.

    Attributes:
        side: pixels of a result, in height and in width.
        half: float32 (n, 2), half the window's width and height; the width is negative where the
            window is mirrored left to right.
        centre: float32 (n, 2), horizontal and vertical.
    """

    side: int
    half: Tensor
    centre: Tensor

    @staticmethod
    def draw(count: int, side: int, generator: torch.Generator | None) -> RandomWindows:
        """Draw the windows of ``count`` images, independent of each other."""
        area, ratio, right, down = torch.rand(4, count, generator=generator)
        area = AREA + (1 - AREA) * area
        ratio = RATIO ** (2 * ratio - 1)
        half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp_(max=1)
        centre = (2 * torch.stack([right, down], 1) - 1) * (1 - half)
        half[:, 0] *= 1 - 2 * torch.randint(2, (count,), generator=generator)
        return RandomWindows(side, half, centre)

    def to(self, device: torch.device) -> RandomWindows:
        """Return the windows on ``device``."""
        return RandomWindows(self.side, self.half.to(device), self.centre.to(device))

    def __getitem__(self, part: slice) -> RandomWindows:
        return RandomWindows(self.side, self.half[part], self.centre[part])

    def __call__(self, images: Tensor) -> Tensor:
        """Return windows of ``images`` (n, channels, height, width), in float32, interpolated.

        Bilinear: a window is at most a seventh larger than the result, so that nothing has to be
        smoothed before.
        """
        if not len(images):  # a process's share of a small batch; torch samples no empty grid
            return images.new_zeros(0, images.shape[1], self.side, self.side, dtype=torch.float32)
        # A row for each coordinate of the image: its factors of x, y and 1 in the result.
        maps = torch.cat([torch.diag_embed(self.half), self.centre.unsqueeze(2)], 2)
        size = (*images.shape[:2], self.side, self.side)
        grid = F.affine_grid(maps, list(size), align_corners=False)
        return F.grid_sample(
            images.to(torch.float32), grid, padding_mode="border", align_corners=False
        )
