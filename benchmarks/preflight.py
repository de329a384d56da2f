"""Claim: a check of eight CLIP ViT-B/32 takes less than 5 s: it reads configurations and headers, no weights.

The checkpoints are sparse files: real names and shapes, holes for values.

python benchmarks/preflight.py
"""

import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from common import company, median_seconds, quiet, show
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, ViTImageProcessor

from adamerge.config import job_from_arguments
from adamerge.preflight import check

EXPERTS, REPEATS = 8, 3
CLASSES = ("cat", "dog")


def main() -> None:
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        config = write(Path(folder))
        command = [str(Path(sys.executable).with_name("adamerge")), "check", str(config)]
        arguments = [f"--config={config}"]
        start = time.perf_counter()
        check(job_from_arguments(arguments))
        first = time.perf_counter() - start
        # `--help` imports nothing; the modules that a job is made of, torch among them, are the second row
        modules = [sys.executable, "-c", "import adamerge.config, adamerge.preflight"]
        library = [sys.executable, "-c", "import torch, lightning.pytorch, transformers"]
        seconds = median_seconds(
            {
                "import of torch, lightning and transformers": ran(library),
                "import of what a check needs": ran(modules),
                "the whole command": ran(command),
                "the check itself, again in the same process": lambda: check(job_from_arguments(arguments)),
            },
            repeats=REPEATS,
        )
        seconds["the check itself, the first in its process"] = first
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    show(
        f"adamerge check, a base and {EXPERTS} experts, CLIP ViT-B/32",
        f"{size / 1e9:.1f} GB of checkpoints by their headers; median of {REPEATS}{company()}",
        ["what", "seconds"],
        [[name, f"{each:.2f}"] for name, each in seconds.items()],
    )


def ran(command: list[str]) -> Callable[[], Any]:
    return lambda: subprocess.run(command, check=True, capture_output=True)


def write(folder: Path) -> Path:
    """Checkpoints, a few pictures, and the configuration that names them."""
    with torch.device("meta"):
        whole, tower = CLIPModel(CLIPConfig()), CLIPVisionModel(CLIPVisionConfig())
    save(whole, folder / "base")
    tasks = {}
    for number in range(EXPERTS):
        name = f"task{number}"
        save(tower, folder / name)
        root = folder / "pictures" / name
        for path in (root / split / kind for split in ("train", "test") for kind in CLASSES):
            path.mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(path / "0.png")
        tasks[name] = {"class_path": "adamerge.data.ImageFolder", "init_args": {"root": str(root)}}
    plain = {
        "model": {
            "base": str(folder / "base"),
            "experts": {task: str(folder / task) for task in tasks},
            "backbone": {"class_path": "adamerge.backbones.CLIP"},
        },
        "data": {"tasks": tasks},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(plain))
    return config


def save(net: Any, folder: Path) -> None:
    """As `save_pretrained` does, but without values."""
    folder.mkdir()
    net.config.architectures = [type(net).__name__]
    net.config.save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    sparse(folder / "model.safetensors", ((name, tensor.shape) for name, tensor in net.state_dict().items()))


def sparse(file: Path, shapes: Iterable[tuple[str, torch.Size]]) -> None:
    """A safetensors file of fp32 tensors that holds nothing but its header."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes:
        start, end = end, end + 4 * shape.numel()
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)


if __name__ == "__main__":
    main()
