"""A CLIP vision tower, experts, heads and pictures that both sides of a comparison read from one folder.

Random ones of a configuration, made in place: nothing is fetched. An expert is the base with noise that is a function
of (task, tensor), so that any number of them takes no disk. Or towers that are given, as those of the zoo. Imports
nothing of adamerge: the peer reads this too.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

SHAPES: dict[str, dict[str, Any]] = {
    "ViT-B/32": {},  # what the configuration is by default
    "small": {
        **{"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
        **{"image_size": 64, "patch_size": 16, "projection_dim": 128},
    },
}
INIT, SCALE, NOISE = 0.3, 100.0, 1e-3  # of the coefficients; CLIP's of the logits; of the experts' weights
SEED = 1  # of the masks in the first step


class Tower(nn.Module):
    """Any image tower, from pictures to features [B, D], in the form of transformers' ones."""

    def __init__(self, visual: nn.Module, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.visual, self.config = visual, config

    def forward(self, pixels: Tensor) -> BaseModelOutputWithPooling:
        """With the features in both places."""
        features = self.visual(pixels)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)


class Inputs:
    """What `write` or `write_given` has put into a folder.

    Attributes:
        tasks: The names of the T tasks.
        options: Whatever else the arms are told.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.options = json.loads((folder / "options.json").read_text())
        self.tasks = [f"task{t}" for t in range(self.options["tasks"])]
        self.config = CLIPVisionConfig(**SHAPES.get(self.options["shape"]) or self.options.get("said", {}))

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

    @staticmethod
    def write_given(folder: Path, name: str, towers: Sequence[nn.Module], pixels: Sequence[Tensor]) -> "Inputs":
        """Towers of one architecture, the base's first, and pictures [B, 3, H, W] of each of the others' tasks."""
        tasks, side = [f"task{t}" for t in range(len(pixels))], pixels[0].shape[-1]
        with torch.no_grad():
            width = towers[0](pixels[0][:1]).shape[1]
        options = {"shape": name, "tasks": len(tasks), "images": len(pixels[0])}
        said = {"image_size": side, "hidden_size": width, "projection_dim": width, "num_attention_heads": 1}
        (folder / "options.json").write_text(json.dumps(options | {"said": said}))
        for who, tower in zip(["base", *tasks], towers, strict=True):
            torch.save(tower, folder / f"{who}.pt")
        torch.manual_seed(0)
        heads = {task: F.normalize(torch.randn(10, width), dim=-1) for task in tasks}
        save_file({**heads, "projection": torch.eye(width)}, folder / "heads.safetensors")
        save_file(dict(zip(tasks, pixels, strict=True)), folder / "batches.safetensors")
        return Inputs(folder)

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
        number, side = sum(parameter.numel() for parameter in self.base().parameters()), self.config.image_size
        return (
            f"{self.options['shape']}, {number / 1e6:.1f} M parameters (P = {4 * number / 1e6:.0f} MB), pictures of "
            f"{side} x {side}, {len(self.tasks)} tasks of {self.options['images']} images, fp32"
        )

    def base(self) -> nn.Module:
        """The tower with the base's weights."""
        if self._is_given:
            return self._given("base")
        net = CLIPVisionModel(self.config)
        net.load_state_dict(load_file(self.folder / "base.safetensors"))
        return net

    def expert(self, task: str) -> nn.Module:
        """The tower with an expert's weights."""
        if self._is_given:
            return self._given(task)
        net = self.base()
        weights = self.weights(task, dict(net.named_parameters()))
        for name, parameter in net.named_parameters():
            parameter.data = weights[name]
        return net

    def weights(self, task: str, base: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """An expert's parameters by name."""
        if self._is_given:
            return {name: parameter.detach() for name, parameter in self._given(task).named_parameters()}
        return Expert(base, self.tasks.index(task))

    def adapter(self, task: str) -> tuple[Tensor, Tensor]:
        """What Surgery's adapter of a task starts from: down [16, D], up [D, 16]."""
        generator = torch.Generator().manual_seed(self.tasks.index(task))
        down, up = (torch.randn(16, self.config.projection_dim, generator=generator) / 16 for _ in range(2))
        return down, up.T.contiguous()

    @property
    def _is_given(self) -> bool:
        return self.options["shape"] not in SHAPES

    def _given(self, who: str) -> Tower:
        visual = torch.load(self.folder / f"{who}.pt", weights_only=False)  # written by `write_given`
        return Tower(visual.eval().requires_grad_(), self.config)


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
