"""Five tasks over scikit-learn's handwritten digits (1797 real scans of 8 x 8), one pretrained base, five experts.

The base learns, without digit labels, to tell which of eight ways a scan was turned and inverted. A linear head per
task is fitted on the base's features and frozen; each expert then fine-tunes the body under its head. All share one
body, as CLIP's image tower is shared under its zero-shot heads.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge.files import built_once, cache_dir
from adamerge.terminal import progress_console
from adamerge.types import InputError

VERSION = "1"  # part of the cache's path: raise it when anything here changes what is built
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
    image, digit = (torch.from_numpy(array[SPLITS[split]]) for array in scans())
    image = image.float()[:, None] * 2 - 1
    if task == "turned":
        image = image.rot90(1, (2, 3))
    if task == "inverted":
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(SPLITS[split].start))
        image = -image + 0.4 * noise
    label = {"parity": digit % 2, "large": (digit > 4).long()}.get(task, digit)
    return image.contiguous(), label


@lru_cache(maxsize=1)
def scans() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """scikit-learn's 1797 scans, shuffled: pixels [N, 8, 8] in [0, 1], 1 where there is ink, and digits [N]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.RandomState(0).permutation(len(found.target))
    return found.images[order] / 16, found.target[order].astype(np.int64)


def locate(model: str) -> Path:
    """The safetensors file of `base` or of a task's expert; the whole pool is trained first if it is not cached."""
    if model not in ("base", *TASKS):
        raise InputError(f"The demo pool digits has no model '{model}'; it has base, {', '.join(TASKS)}.")
    return built_once(cache_dir() / "demo" / f"digits-{VERSION}", build) / f"{model}.safetensors"


def build(folder: Path) -> None:
    """Train the base and the five experts into a folder; the same bits on one machine with one number of threads."""
    with torch.random.fork_rng(devices=[]), Progress(console=progress_console(), transient=True) as progress:
        torch.manual_seed(0)
        bar = progress.add_task("Training the digits demo, once", total=1 + len(TASKS))
        net = DigitNet()
        _pretrain(net)
        save_file(net.state_dict(), folder / "base.safetensors")
        base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        for task in TASKS:
            progress.update(bar, advance=1)
            net.load_state_dict(base)
            head = _fitted_head(net, task)
            _train(net, *samples(task, "train"), head, train_head=False, epochs=10, lr=5e-4)
            state = {**net.state_dict(), "head.weight": head.weight.detach(), "head.bias": head.bias.detach()}
            save_file(state, folder / f"{task}.safetensors")


def _pretrain(net: DigitNet) -> None:
    image, _ = samples("digit", "train")
    views = [flip * image.rot90(turn, (2, 3)) for turn in range(4) for flip in (1, -1)]
    view = torch.arange(len(views)).repeat_interleave(len(image))
    _train(net, torch.cat(views), view, nn.Linear(WIDTH, len(views)), train_head=True, epochs=2, lr=1e-3)


def _fitted_head(net: DigitNet, task: str) -> nn.Linear:
    """A linear head on the frozen features, full-batch."""
    image, label = samples(task, "train")
    with torch.no_grad():
        features = net(image)
    head = nn.Linear(WIDTH, len(CLASSES[task]))
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(features), label) + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head


def _train(
    net: nn.Module, image: Tensor, label: Tensor, head: nn.Linear, *, train_head: bool, epochs: int, lr: float
) -> None:
    parameters = [*net.parameters(), *(head.parameters() if train_head else ())]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    for _ in range(epochs):
        for batch in torch.randperm(len(image)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(head(net(image[batch])), label[batch]).backward()
            optimizer.step()
