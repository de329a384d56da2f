"""A CLIP vision tower, experts, heads and pictures that both sides of a comparison read from one folder: all random.

Weights are of a configuration, made in place: nothing is fetched. An expert is the base with noise that is a function
of (task, tensor), so that any number of them takes no disk. Imports nothing of adamerge: the peer reads this too.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

SHAPES: dict[str, dict[str, Any]] = {
    "ViT-B/32": {},  # what the configuration is by default
    "small": {
        **{"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"image_size": 64, "patch_size": 16, "projection_dim": 128},
    },
}
INIT, SCALE, NOISE = 0.3, 100.0, 1e-3  # of the coefficients; CLIP's of the logits; of the experts' weights
SEED = 1  # of the masks in the first step


class Inputs:
    """What `write` has put into a folder.

    Attributes:
        tasks: The names of the T tasks.
        options: Whatever else the arms are told.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options = json.loads((folder / "options.json").read_text())
        self.tasks = [f"task{t}" for t in range(self.options["tasks"])]
        self.config = CLIPVisionConfig(**SHAPES[self.options["shape"]])

    @staticmethod
    def write(folder: Path, *, shape: str, tasks: int, images: int, **options: Any) -> "Inputs":
        """Make weights, heads of 10 to 100 classes, and a batch for each task."""
        folder.mkdir(parents=True, exist_ok=True)
        options = {"shape": shape, "tasks": tasks, "images": images, **options}
        (folder / "options.json").write_text(json.dumps(options))
        inputs = Inputs(folder)
        config, classes = inputs.config, torch.linspace(10, 100, tasks).int().tolist()
        torch.manual_seed(0)
        save_file(CLIPVisionModel(config).state_dict(), folder / "base.safetensors")
        heads = {task: torch.randn(c, config.projection_dim) for task, c in zip(inputs.tasks, classes, strict=True)}
        heads = {task: F.normalize(weight, dim=-1) for task, weight in heads.items()}
        projection = torch.randn(config.projection_dim, config.hidden_size) / config.hidden_size**0.5
        save_file({**heads, "projection": projection}, folder / "heads.safetensors")
        size = (images, 3, config.image_size, config.image_size)
        save_file({task: torch.randn(size) for task in inputs.tasks}, folder / "batches.safetensors")
        return inputs

    @cached_property
    def heads(self) -> dict[str, Tensor]:
        """Normalised class embeddings [C, D] of each task."""
        return {
            task: tensor
            for task, tensor in load_file(self.folder / "heads.safetensors").items()
            if task != "projection"
        }

    @cached_property
    def projection(self) -> nn.Linear:
        """From the tower's output to features [B, D]: frozen, the same for all experts."""
        weight = load_file(self.folder / "heads.safetensors")["projection"]
        projection = nn.Linear(*reversed(weight.shape), bias=False)
        projection.weight = nn.Parameter(weight, requires_grad=False)
        return projection

    @cached_property
    def batches(self) -> dict[str, Tensor]:
        """Pictures [B, 3, H, W] of each task, the same at every step."""
        return {task: pixels.clone() for task, pixels in load_file(self.folder / "batches.safetensors").items()}

    def describe(self) -> str:
        """For the line above a table."""
        number = sum(parameter.numel() for parameter in self.base().parameters())
        tokens, images = (self.config.image_size // self.config.patch_size) ** 2 + 1, self.options["images"]
        return (
            f"{self.options['shape']}, {number / 1e6:.1f} M parameters (P = {4 * number / 1e6:.0f} MB), {tokens} "
            f"tokens, {len(self.tasks)} tasks of {images} images, fp32"
        )

    def base(self) -> CLIPVisionModel:
        """The tower with the base's weights."""
        net = CLIPVisionModel(self.config)
        net.load_state_dict(load_file(self.folder / "base.safetensors"))
        return net

    def expert(self, task: str) -> CLIPVisionModel:
        """The tower with an expert's weights."""
        net = self.base()
        weights = Expert(dict(net.named_parameters()), self.tasks.index(task))
        for name, parameter in net.named_parameters():
            parameter.data = weights[name]
        return net


class Expert(Mapping[str, Tensor]):
    """An expert's weights by name, each made when it is asked for."""

    def __init__(self, base: Mapping[str, Tensor], task: int) -> None:
        self._base, self._task = base, task
        self._places = {name: place for place, name in enumerate(base)}

    def __getitem__(self, name: str) -> Tensor:
        base = self._base[name].detach()
        generator = torch.Generator().manual_seed(100_000 * (1 + self._task) + self._places[name])
        return base + NOISE * torch.randn(base.shape, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)
