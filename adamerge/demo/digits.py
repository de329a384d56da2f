"""Five tasks over handwritten digits (1797 real scans of 8 x 8), one pretrained base, five experts.

The base learned, without digit labels, to tell which of eight ways a scan was turned and inverted. A linear head per
task was fitted on the base's features and frozen; each expert then fine-tuned the body under its head. All share one
body, as CLIP's image tower is shared under its zero-shot heads. Scans and weights come with the package (`shipped.py`);
`digits_training.py` made them.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adamerge.demo.shipped import POOLS, load_half
from adamerge.files import built_once, cache_dir
from adamerge.types import InputError

VERSION = "2"  # part of the cache's path: raise it when the shipped files change
TASKS = ("digit", "turned", "inverted", "parity", "large")
CLASSES: dict[str, tuple[str, ...]] = {
    "digit": tuple("0123456789"),
    "turned": tuple("0123456789"),
    "inverted": tuple("0123456789"),
    "parity": ("even", "odd"),
    "large": ("at most four", "more than four"),
}
SPLITS = {"train": slice(0, 797), "unlabeled": slice(797, 1297), "test": slice(1297, 1797)}
WIDTH = 48
NOISE = 64


class DigitNet(nn.Module):
    """Image [B, 1, 8, 8] -> features [B, 48]: a stem, three residual blocks, LayerNorm over the mean of all places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(_Block() for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        """Features of a batch of images."""
        hidden = self.stem(image)
        for index, block in enumerate(self.blocks):
            hidden = block(hidden if index != 1 else F.avg_pool2d(hidden, 2))
        return self.norm(hidden.mean((2, 3)))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, WIDTH)
        self.conv_in, self.conv_out = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.conv_out(F.gelu(self.conv_in(self.norm(hidden))))


def samples(task: str, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] in about [-1, 1] and labels [N] of a task's split; the three splits share no scan."""
    if task not in TASKS or split not in SPLITS:
        raise InputError(
            f"The digits have tasks {', '.join(TASKS)} and splits {', '.join(SPLITS)}; asked for {task}, {split}."
        )
    image, digit, noise = (tensor[SPLITS[split]] for tensor in _shipped())
    image = image.float()[:, None] / 8 - 1
    if task == "turned":
        image = image.rot90(1, (2, 3))
    if task == "inverted":
        image = noise.float()[:, None] / NOISE - image
    label = {"parity": digit % 2, "large": (digit > 4).long()}.get(task, digit)
    return image.contiguous(), label


def scans() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """The 1797 scans: pixels [N, 8, 8] in [0, 1], 1 where there is ink, and digits [N]."""
    image, digit, _ = _shipped()
    return image.double().numpy() / 16, digit.numpy()


@lru_cache(maxsize=1)
def _shipped() -> tuple[Tensor, Tensor, Tensor]:
    """Ink [N, 8, 8] of 0 to 16, digits [N], and the noise [N, 8, 8] of the inverted scans in steps of 1 / NOISE."""
    held = load_file(POOLS / "digits" / "scans.safetensors")
    return held["ink"], held["digit"].long(), held["noise"]


def locate(model: str) -> Path:
    """The safetensors file of `base` or of a task's expert, unpacked on first use.

    Raises:
        InputError: No such model.
    """
    if model not in ("base", *TASKS):
        raise InputError(f"The demo pool digits has no model '{model}'; it has base, {', '.join(TASKS)}.")
    return built_once(cache_dir() / "demo" / f"digits-{VERSION}", unpack) / f"{model}.safetensors"


def unpack(folder: Path, shipped: Path = POOLS / "digits") -> None:
    """Write base and experts into a folder, in fp32."""
    for model in ("base", *TASKS):
        save_file(load_half(shipped / f"{model}.safetensors"), folder / f"{model}.safetensors")
