"""CLIP models of open_clip: the image tower is merged, the base's text tower makes the heads."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge.backbones.clip_source import CONFIG, WEIGHTS, ClipSource, lasting
from adamerge.backbones.pixels import eight_bits
from adamerge.backbones.prompts import Embed, ZeroShot, check_prompts, head_of, kept_heads
from adamerge.blocks import block_names
from adamerge.checkpoints import State
from adamerge.files import sha256
from adamerge.naming import literal
from adamerge.task_modules import TaskModule
from adamerge.types import Batch, InputError, TaskInfo


class OpenCLIP(ZeroShot):
    """A CLIP of open_clip: its image tower is merged; zero-shot heads come from the base's text tower.

    Base and experts may be whole CLIP checkpoints or hold the image tower alone (tensors `visual.*`, under any one
    prefix); what else they hold is not compared. The base must be whole: its text tower makes the heads, and the logit
    scale is its own.

    Args:
        model: Where architecture, preprocessing and tokenizer come from: an open_clip name (`ViT-B-32`), a name with
            the tag of pretrained weights (`open_clip:ViT-B-32/laion2b_s34b_b79k`), `hf-hub:ORG/NAME`, a folder, or
            `demo:zoo/base`. Base and experts take the same forms, or name a checkpoint file.
        templates: Prompts with `{}` for the class name, for all tasks or for each; their embeddings are averaged.
        input: Which entry of a sample is the image: a PIL image, a uint8 tensor of the network's size [3, H, W], or a
            floating tensor that is already normalised.
        blocks: Regular expression of the whole names of the image tower's blocks; by default the parts of its largest
            `nn.ModuleList`, else `nn.Sequential`.

    Raises:
        InputError: No such model, no network, weights that open_clip cannot read, or class names that repeat.

    Source: open_clip; zero-shot classifiers as in CLIP, arXiv 2103.00020: prompts normalised, averaged, normalised.
    """

    def __init__(
        self,
        model: str,
        *,
        templates: Sequence[str] | Mapping[str, Sequence[str]] = ("a photo of a {}.",),
        input: str = "image",
        blocks: str | None = None,
    ) -> None:
        self._arguments["model"] = lasting(model)
        self._source, self._templates, self._input = ClipSource(lasting(model)), templates, input
        self._blocks = blocks
        self._settings: dict[str, Any] = {}  # of the preprocessing, once a model was made
        check_prompts(templates)

    library = "open_clip"

    # --- the network

    def build(self) -> nn.Module:
        return self._tower(self._source.create())

    def _tower(self, clip: Any) -> "_ImageTower":
        self._settings = dict(clip.visual.preprocess_cfg)
        return _ImageTower(clip.visual, self._settings)

    def blocks(self, net: nn.Module) -> Sequence[str]:
        return block_names(net, self._blocks)

    def features(self, net: nn.Module, batch: Batch) -> Tensor:
        if self._input not in batch:
            raise InputError(f"`backbone.input` is '{self._input}', but a batch holds {', '.join(sorted(batch))}.")
        return net(batch[self._input])

    def prepare(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        image = sample.get(self._input)
        if image is None or isinstance(image, Tensor):
            return sample
        return {**sample, self._input: self._resize(eight_bits(image))}

    @cached_property
    def _resize(self) -> Callable[[Any], Tensor]:
        """From a PIL image to uint8 [3, H, W]: open_clip's own preprocessing, which the network goes on with."""
        from open_clip.transform import PreprocessCfg, image_transform_v2
        from torchvision.transforms import Compose, PILToTensor

        settings = self._settings or self._source.create().visual.preprocess_cfg
        steps = image_transform_v2(PreprocessCfg(**settings), is_train=False).transforms
        assert [type(step).__name__.removeprefix("Maybe") for step in steps[-2:]] == ["ToTensor", "Normalize"]
        return Compose([*steps[:-2], PILToTensor()])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_resize"}

    def open(self, source: str) -> State:
        return self._source.image_state(source)

    def made_of(self) -> Sequence[Any]:
        home = self._source.folder
        settings = home.glob(CONFIG) if home is not None else ()  # of the preprocessing, too
        files = [*settings, *self._source.tokenizer_files()]
        return [self._source.config(), *([file.name, sha256(file)] for file in files)]

    # --- heads

    def heads(self, tasks: Sequence[TaskInfo]) -> dict[str, TaskModule]:
        base = tasks[0].base
        assert isinstance(base, State)
        made_of = [base.sha256(), *self.made_of()]

        def embedder() -> Embed:
            clip, tokenize = self._whole(base), self._source.tokenizer()
            return lambda classes, prompts: _embedded(clip, tokenize, classes, prompts)

        return kept_heads(tasks, self._templates, made_of, embedder)

    def _whole(self, base: Mapping[str, Tensor] | None) -> Any:
        assert isinstance(base, State)
        return self._source.loaded(base.files)

    # --- export

    @torch.no_grad()
    def export(self, net: nn.Module, base: State, folder: Path, heads: Mapping[str, TaskModule]) -> None:
        assert isinstance(net, _ImageTower)
        image = {f"visual.{name}": tensor for name, tensor in net.visual.state_dict().items()}
        dtype = next(tensor.dtype for tensor in image.values() if tensor.is_floating_point())
        whole = self._whole(base).state_dict()
        scalars = {name: tensor for name, tensor in whole.items() if name in ("logit_scale", "logit_bias")}
        cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in whole.items()}
        state = {**cast, **scalars, **image}  # an exponent rounded to bf16 would be off by a percent
        save_file({name: tensor.cpu().clone().contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
        settings = {key: value for key, value in net.settings.items() if key != "size"}
        text = json.dumps({"model_cfg": self._source.config(), "preprocess_cfg": settings}, indent=2)
        (folder / CONFIG).write_text(text)
        for file in self._source.tokenizer_files():
            shutil.copyfile(file, folder / file.name)

    def exported(self, folder: Path) -> nn.Module:
        clip = ClipSource(f"local-dir:{folder}").exported()
        return _ImageTower(clip.visual, clip.visual.preprocess_cfg).eval()

    def exported_heads(self, folder: Path, classes: Mapping[str, Sequence[str]]) -> Mapping[str, TaskModule]:
        source = ClipSource(f"local-dir:{folder}")
        clip, tokenize = source.exported(), source.tokenizer()
        return {
            task: head_of(TaskInfo(task, names), _embedded(clip, tokenize, names, self.templates(task)))
            for task, names in classes.items()
        }

    def example(self, net: nn.Module, number: int) -> Batch:
        assert isinstance(net, _ImageTower)
        size = net.settings["size"]
        shape = (size, size) if isinstance(size, int) else tuple(size)
        generator = torch.Generator().manual_seed(0)
        return {self._input: torch.randint(256, (number, 3, *shape), generator=generator, dtype=torch.uint8)}

    def loading(self, task: str) -> str:
        return f"""import json
import open_clip
import torch
from PIL import Image

folder = "{{folder}}"
clip, _, preprocess = open_clip.create_model_and_transforms("local-dir:" + folder)
tokenize = open_clip.get_tokenizer("local-dir:" + folder)
task = json.load(open(folder + "/tasks.json"))[{literal(task, template=True)}]
head = open_clip.build_zero_shot_classifier(clip.eval(), tokenize, task["classes"], task["templates"])
with torch.inference_mode():
    features = clip.encode_image(preprocess(Image.open("picture.png"))[None], normalize=True)
print(task["classes"][int((features @ head).argmax())])"""


class _ImageTower(nn.Module):
    """Image [B, 3, H, W] -> embedding [B, D]; integers in [0, 255] are normalised here, on the device."""

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self.visual, self.settings = visual, dict(settings)
        for name in ("mean", "std"):
            value = torch.tensor(settings[name], dtype=torch.float32)[:, None, None]
            self.register_buffer(name, value, persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        if image.dtype == torch.uint8:
            image = (image.to(self.mean.dtype) / 255 - self.mean) / self.std
        embedding = self.visual(image)
        return embedding[0] if isinstance(embedding, tuple) else embedding


@torch.no_grad()
def _embedded(clip: Any, tokenize: Any, classes: Sequence[str], templates: Sequence[str]) -> dict[str, Tensor]:
    """A zero-shot head's tensors, as open_clip makes it: embeddings [C, D], scale [], bias []."""
    from open_clip import build_zero_shot_classifier

    weight_DC = build_zero_shot_classifier(clip, tokenize, list(classes), list(templates))
    scale, bias = clip.logit_scale.exp(), getattr(clip, "logit_bias", None)
    bias = torch.zeros(()) if bias is None else bias
    head = {"weight": weight_DC.T.contiguous(), "scale": scale.reshape(()), "bias": bias.reshape(())}
    return {name: tensor.float().clone() for name, tensor in head.items()}
