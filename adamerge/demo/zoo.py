"""A small CLIP and eight experts fine-tuned from it, with pictures of eight kinds.

The model is open_clip's own: a convolutional image tower of timm's with LayerNorm, and a text tower whose captions make
the zero-shot heads. The base learned from image-caption pairs of all tasks' contents in mixed looks; each expert then
fine-tuned the image tower on one task under its frozen head. Weights and pictures come with the package (`shipped.py`)
and are unpacked into the layouts that users have: an open_clip folder for each model, a `datasets` folder for each
task's pictures. `zoo_training.py` made them.
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from adamerge.demo.pictures import SIZE, TASKS
from adamerge.demo.shipped import POOLS, load_half, load_sheet
from adamerge.files import built_once, cache_dir
from adamerge.types import InputError

VERSION = "2"  # part of the cache's path: raise it when the shipped files change
SPLITS = {"unlabeled": 500, "test": 500}
TEMPLATE = "a picture of {}."
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
    """The folder of `base`, of a task's expert, or of a task's pictures (`data/TASK`); all are unpacked on first use.

    Raises:
        InputError: No such model or task.
    """
    if name.removeprefix("data/") not in (*TASKS, *(() if name.startswith("data/") else ("base",))):
        raise InputError(f"The zoo has no '{name}'; it has base, {', '.join(TASKS)}, and data/TASK for each of these.")
    return built_once(cache_dir() / "demo" / f"zoo-{VERSION}", unpack) / name


def unpack(folder: Path, shipped: Path = POOLS / "zoo") -> None:
    """Write the pictures' and the models' folders, weights in fp32."""
    labels = load_file(shipped / "labels.safetensors")
    for task in TASKS:
        _save_pictures(folder / "data" / task, task, shipped, labels)
    text = load_half(shipped / "text.safetensors")
    for model in ("base", *TASKS):
        _save_model(folder / model, {**load_half(shipped / f"{model}.safetensors"), **text})


def _save_pictures(folder: Path, task: str, shipped: Path, labels: dict[str, Tensor]) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, disable_progress_bars, enable_progress_bars

    features = Features({"image": Image(), "label": ClassLabel(names=list(TASKS[task].classes))})
    disable_progress_bars()
    splits = {}
    for split in SPLITS:
        images = load_sheet(shipped / f"{task}-{split}.webp", SIZE)
        columns = {"image": list(images), "label": labels[f"{task}.{split}"].tolist()}
        splits[split] = Dataset.from_dict(columns, features=features)
    DatasetDict(splits).save_to_disk(str(folder))
    enable_progress_bars()


def _save_model(folder: Path, state: dict[str, Tensor]) -> None:
    """open_clip's hub layout; its tokenizer is the library's own and needs no file."""
    folder.mkdir()
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}, indent=2)
    )
