"""A small CLIP and eight experts fine-tuned from it, trained on this machine on first use and cached.

The model is open_clip's own: a convolutional image tower of timm's with LayerNorm, and a text tower whose captions make
the zero-shot heads. The base learns from image-caption pairs of all tasks' contents in mixed looks; each expert then
fine-tunes the image tower on one task under its frozen head. Everything is written in the layouts that users have: an
open_clip folder for each model, a `datasets` folder for each task's pictures.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from adamerge.demo.pictures import SIZE, TASKS, pictures
from adamerge.files import built_once, cache_dir
from adamerge.seeding import seed_of
from adamerge.terminal import progress_console
from adamerge.types import InputError

VERSION = "1"  # part of the cache's path: raise it when anything here changes what is built
SPLITS = {"train": 3000, "unlabeled": 500, "test": 500}
PAIRS = 1500  # image-caption pairs per task
TEMPLATE = "a picture of {}."
_CAPTIONS = (TEMPLATE, "{}.", "a small picture that shows {}.")
MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {
        "timm_model_name": "test_efficientnet_ln",
        "timm_model_pretrained": False,
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": SIZE,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def locate(name: str) -> Path:
    """The folder of `base`, of a task's expert, or of a task's pictures (`data/TASK`); all are made if not cached.

    Raises:
        InputError: No such model or task.
    """
    if name.removeprefix("data/") not in (*TASKS, *(() if name.startswith("data/") else ("base",))):
        raise InputError(f"The zoo has no '{name}'; it has base, {', '.join(TASKS)}, and data/TASK for each of these.")
    return built_once(cache_dir() / "demo" / f"zoo-{VERSION}", build) / name


def build(folder: Path, effort: float = 1.0) -> None:
    """Draw the pictures, train the base and its experts into a folder; the same bits with one number of threads.

    Args:
        folder: Where.
        effort: How many samples to draw and see, as a share of the real zoo's.
    """
    from datasets import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    with torch.random.fork_rng(devices=[]), Progress(console=progress_console(), transient=True) as progress:
        torch.manual_seed(0)
        bar = progress.add_task("Making the zoo, once: pictures", total=4 + 8 + len(TASKS))
        for task in TASKS:
            _save_pictures(folder / "data" / task, task, effort)
            progress.advance(bar, 0.5)
        model = _new_clip()
        for share in _pretrain(model, effort):
            progress.update(bar, description="Making the zoo, once: base", completed=4 + 8 * share)
        _save_model(folder / "base", model)
        base = {name: tensor.clone() for name, tensor in model.visual.state_dict().items()}
        for task in TASKS:
            progress.update(bar, description=f"Making the zoo, once: expert {task}")
            model.visual.load_state_dict(base)
            _fine_tune(model, task, effort)
            _save_model(folder / task, model)
            progress.advance(bar)
    enable_progress_bars()


def _save_pictures(folder: Path, task: str, effort: float) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    features = Features({"image": Image(), "label": ClassLabel(names=list(TASKS[task].classes))})
    splits = {}
    for split, number in SPLITS.items():
        images, labels = pictures(task, split, max(128, int(effort * number)))
        splits[split] = Dataset.from_dict({"image": list(images), "label": labels}, features=features)
    DatasetDict(splits).save_to_disk(str(folder))


def _save_model(folder: Path, model: nn.Module) -> None:
    """open_clip's hub layout; its tokenizer is the library's own and needs no file."""
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
              folder / "open_clip_model.safetensors")  # fmt: skip
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}, indent=2)
    )


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
    """CLIP's loss, in which equal captions are one; yields the share done."""
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

    samples = _pixels(task, "train", max(128, int(effort * SPLITS["train"])))
    for _ in _trained(model.visual, samples, loss, batch_size=64, epochs=5, lr=1.5e-3):
        pass


def _trained(
    module: nn.Module, samples: tuple[Tensor, Tensor], loss: Any, *, batch_size: int, epochs: int, lr: float
) -> Iterator[float]:
    """AdamW with a one-cycle schedule; yields the share done after each epoch."""
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
