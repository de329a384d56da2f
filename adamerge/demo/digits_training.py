"""Training of the digits: `python -m adamerge.demo digits FOLDER` makes the shipped files again.

Base and experts are trained under seeds of their own, so that each expert can be made again by itself.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge.demo.digits import CLASSES, NOISE, TASKS, WIDTH, DigitNet, samples
from adamerge.demo.shipped import rounded, save_half
from adamerge.seeding import seed_of
from adamerge.terminal import progress_console

SEED = 2  # of 0 to 4, its average and task arithmetic are nearest to those of the first pool


def train(folder: Path) -> None:
    """Train the base and the five experts on the shipped scans; write all of the pool's files."""
    collect_scans(folder)
    base = pretrained()
    save_half(base, folder / "base.safetensors")
    for task in track(TASKS, "Training the experts on digits", console=progress_console(), transient=True):
        save_half(expert(task, base), folder / f"{task}.safetensors")


def collect_scans(folder: Path) -> None:
    """Write scikit-learn's 1797 scans in a random order, with the noise of the inverted ones."""
    from sklearn.datasets import load_digits

    found, random = load_digits(), np.random.RandomState(0)
    order = random.permutation(len(found.target))
    noise = np.clip(np.rint(0.4 * NOISE * random.standard_normal(found.images.shape)), -127, 127)
    held = {"ink": found.images[order].astype(np.uint8), "digit": found.target[order].astype(np.uint8)}
    tensors = {name: torch.from_numpy(array) for name, array in {**held, "noise": noise.astype(np.int8)}.items()}
    save_file(tensors, folder / "scans.safetensors")


def pretrained() -> dict[str, Tensor]:
    """Train the base, and return its weights as they are shipped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("digits", "base", SEED))
        net = DigitNet()
        image, _ = samples("digit", "train")
        views = [flip * image.rot90(turn, (2, 3)) for turn in range(4) for flip in (1, -1)]
        view = torch.arange(len(views)).repeat_interleave(len(image))
        _train(net, torch.cat(views), view, nn.Linear(WIDTH, len(views)), train_head=True, epochs=2, lr=1e-3)
        return rounded(net.state_dict())


def expert(task: str, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fine-tune one expert, head included, and return its weights as they are shipped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("digits", task, SEED))
        net = DigitNet()
        net.load_state_dict(base)
        head = _fitted_head(net, task)
        _train(net, *samples(task, "train"), head, train_head=False, epochs=10, lr=5e-4)
        return rounded({**net.state_dict(), "head.weight": head.weight, "head.bias": head.bias})


def _fitted_head(net: DigitNet, task: str) -> nn.Linear:
    """Train a linear head on the frozen features, full-batch."""
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
