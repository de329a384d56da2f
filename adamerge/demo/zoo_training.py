"""Training of the zoo: `python -m adamerge.demo zoo FOLDER` draws its pictures and makes the shipped files again.

Base and experts are trained under seeds of their own, so that each expert can be made again by itself.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from adamerge.demo.pictures import TASKS, pictures
from adamerge.demo.shipped import rounded, save_half, save_sheet
from adamerge.demo.zoo import MODEL, SPLITS, TEMPLATE
from adamerge.seeding import seed_of
from adamerge.terminal import progress_console

PAIRS = 1500  # image-caption pairs per task
TRAINING = 3000  # pictures of an expert
_CAPTIONS = (TEMPLATE, "{}.", "a small picture that shows {}.")


def train(folder: Path, effort: float = 1.0) -> None:
    """Draw the pictures, train the base and its experts; write their shipped files.

    Args:
        folder: Where.
        effort: How many samples to train on, as a share of the real zoo's.
    """
    with Progress(console=progress_console(), transient=True) as progress:
        bar = progress.add_task("Training the zoo: pictures", total=4 + 8 + len(TASKS))
        draw(folder)
        progress.advance(bar, 4)
        progress.update(bar, description="Training the zoo: base")
        base = pretrained(effort, lambda share: progress.update(bar, completed=4 + 8 * share))
        save_half({k: v for k, v in base.items() if not k.startswith("visual.")}, folder / "text.safetensors")
        save_half({k: v for k, v in base.items() if k.startswith("visual.")}, folder / "base.safetensors")
        for task in TASKS:
            progress.update(bar, description=f"Training the zoo: expert {task}")
            save_half(expert(task, base, effort), folder / f"{task}.safetensors")
            progress.advance(bar)


def draw(folder: Path) -> None:
    """Write the pictures that are adapted on and tested on, with their labels."""
    held = {}
    for task in TASKS:
        for split, number in SPLITS.items():
            images, labels = pictures(task, split, number)
            save_sheet(images, folder / f"{task}-{split}.webp")
            held[f"{task}.{split}"] = torch.from_numpy(labels.astype(np.uint8))
    save_file(held, folder / "labels.safetensors")


def pretrained(effort: float = 1.0, tell: Callable[[float], None] = lambda share: None) -> dict[str, Tensor]:
    """Train the base, telling the share done, and return its weights as they are shipped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("zoo", "base"))
        model = _new_clip()
        for share in _pretrain(model, effort):
            tell(share)
        return rounded(model.state_dict())


def expert(task: str, base: dict[str, Tensor], effort: float = 1.0) -> dict[str, Tensor]:
    """Fine-tune one expert's image tower, and return its weights as they are shipped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("zoo", task))
        model = _new_clip()
        model.load_state_dict(base)
        _fine_tune(model, task, effort)
        return rounded({name: tensor for name, tensor in model.state_dict().items() if name.startswith("visual.")})


def _new_clip() -> Any:
    from open_clip import CLIP

    model = CLIP(**MODEL).to(memory_format=torch.channels_last)
    for parameter in model.visual.parameters():
        if parameter.dim() > 1:  # timm's own start is meant for long training
            nn.init.kaiming_normal_(parameter, nonlinearity="linear")
    return model


def _pixels(task: str, split: str, number: int) -> tuple[Tensor, Tensor]:
    images, labels = pictures(task, split, number)
    scaled = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    return scaled.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels)


def _tokens(texts: list[str]) -> Tensor:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])(texts)


def _pretrain(model: Any, effort: float) -> Iterator[float]:
    """Train with CLIP's loss, in which equal captions count as one; yield the share done."""
    random = np.random.default_rng(seed_of("zoo", "captions"))
    images, captions = [], []
    for task, drawn in TASKS.items():
        pixels, labels = _pixels(task, "pretrain", max(128, int(effort * PAIRS)))
        images.append(pixels)
        captions += [_CAPTIONS[random.integers(len(_CAPTIONS))].format(drawn.classes[label]) for label in labels]
    tokens, caption = torch.unique(_tokens(captions), dim=0, return_inverse=True)

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        image, of_image = batch
        distinct, target = of_image.unique(return_inverse=True)
        text = model.encode_text(tokens[distinct], normalize=True)
        logits = model.logit_scale.exp() * model.encode_image(image, normalize=True) @ text.T
        shares = F.one_hot(target, len(distinct)).float()
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, (shares / shares.sum(0)).T)) / 2

    yield from _trained(model, (torch.cat(images), caption), loss, batch_size=128, epochs=8, lr=3e-3)


def _fine_tune(model: Any, task: str, effort: float) -> None:
    with torch.no_grad():
        prompts = _tokens([TEMPLATE.format(name) for name in TASKS[task].classes])
        head = model.encode_text(prompts, normalize=True) * model.logit_scale.exp()

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        image, label = batch
        return F.cross_entropy(F.normalize(model.visual(image), dim=-1) @ head.T, label)

    samples = _pixels(task, "train", max(128, int(effort * TRAINING)))
    for _ in _trained(model.visual, samples, loss, batch_size=64, epochs=5, lr=1.5e-3):
        pass


def _trained(
    module: nn.Module, samples: tuple[Tensor, Tensor], loss: Any, *, batch_size: int, epochs: int, lr: float
) -> Iterator[float]:
    """Train with AdamW and a one-cycle schedule; yield the share done after each epoch."""
    module.train()
    steps = len(samples[0]) // batch_size
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.05, foreach=True)
    schedule = OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        for batch in torch.randperm(len(samples[0]))[: steps * batch_size].split(batch_size):
            optimizer.zero_grad()
            loss((samples[0][batch], samples[1][batch])).backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
            optimizer.step()
            schedule.step()
        yield (epoch + 1) / epochs
    module.eval()
