"""CLIP and its like in transformers: the image tower is merged, the base's text tower makes the heads."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge.backbones.explained import explained
from adamerge.backbones.folder import TOKENIZER, FolderWriter
from adamerge.backbones.layout import Layout
from adamerge.backbones.pixels import ImageInput
from adamerge.backbones.prompts import Embed, ZeroShot, check_prompts, head_of, kept_heads
from adamerge.backbones.transformers import Transformers
from adamerge.checkpoints import State, locate
from adamerge.files import sha256
from adamerge.naming import literal
from adamerge.task_modules import TaskModule
from adamerge.types import Batch, InputError, TaskInfo


class CLIP(ImageInput, ZeroShot, Transformers):
    """A CLIP of transformers, or another model with a vision and a text tower: the vision tower is merged.

    Experts may be whole models or vision towers alone (`CLIPVisionModel`); the projection keeps the base's value where
    no expert has it. The base must be whole: its text tower makes zero-shot heads, under its own logit scale.

    Args:
        model: Where architecture, processor and tokenizer come from: a folder, or a hub id with or without `@revision`.
            By default the merge's base.
        templates: Prompts with `{}` for the class name, for all tasks or for each; their embeddings are averaged.
        attention: Attention implementation, as transformers names them; by default the fastest it finds.
        remote_code: Run code that the model's folder brings along. Only for models you trust as you would code.
        blocks: Regular expression of the whole names of the tower's blocks; by default the parts of its largest
            `nn.ModuleList`.

    Raises:
        InputError: No such model, no processor or tokenizer, or class names that repeat.

    Source: zero-shot classifiers as in CLIP, arXiv 2103.00020: prompts normalised, averaged, normalised.
    """

    auto: ClassVar[str] = "AutoModel"

    def __init__(
        self,
        model: str | None = None,
        *,
        templates: Sequence[str] | Mapping[str, Sequence[str]] = ("a photo of a {}.",),
        attention: str | None = None,
        remote_code: bool = False,
        blocks: str | None = None,
    ) -> None:
        super().__init__(model, attention=attention, remote_code=remote_code, blocks=blocks)
        self._templates = templates
        check_prompts(templates)

    # --- the network

    def build(self) -> nn.Module:
        if not hasattr(self.config, "vision_config") or not hasattr(self.config, "text_config"):
            raise InputError(
                f"'{self.model}' is a {self.config.model_type}, which has no vision and text tower; name a whole CLIP "
                "in `backbone.model`, or choose another backbone."
            )
        return Tower(self._make(self._config())).eval()

    @cached_property
    def layout(self) -> Layout:
        with torch.device("meta"):
            self.build()  # says what it is not
            whole = self._make(self._config())
        return Layout.of(whole).part(set(Tower(whole).state_dict()), "vision_model.")

    def own(self, base: State) -> Mapping[str, str]:
        return {}  # the projection stands beside the tower, and is merged with it

    def spare(self, name: str) -> bool:
        return name.startswith("visual_projection.")

    def features(self, net: nn.Module, batch: Batch) -> Tensor:
        return net(**self.inputs(batch))

    def compared(self, config: Any) -> Any:
        return getattr(config, "vision_config", config)  # a tower alone has its part of the whole's

    # --- heads

    def heads(self, tasks: Sequence[TaskInfo]) -> dict[str, TaskModule]:
        base = tasks[0].base
        assert isinstance(base, State)
        made_of = [base.sha256(), self._config().to_json_string(), type(self).__name__]
        folder = locate(self.model, weights=False)
        made_of += [[f.name, sha256(f)] for f in sorted({f for pattern in TOKENIZER for f in folder.glob(pattern)})]

        def embedder() -> Embed:
            clip = self._loaded(base)
            return lambda classes, prompts: embedded(clip, self._tokens, classes, prompts)

        return kept_heads(tasks, self._templates, made_of, embedder)

    def _loaded(self, base: State) -> Any:
        """The whole of the base."""
        return self._pretrained(self._folder_of(base), base.source)

    def _folder_of(self, base: State) -> Path:
        path = locate(base.source)
        return path if path.is_dir() else path.parent

    def _tokens(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        limit = getattr(getattr(self.config, "text_config", self.config), "max_position_embeddings", None)
        options = {"padding": "max_length", "max_length": limit, "truncation": True, "return_tensors": "pt"}
        made = self._tokenizer(list(texts), **options)
        return {name: made[name] for name in ("input_ids", "attention_mask") if name in made}

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        with explained(f"The tokenizer of '{self.model}' cannot be had", self._code_of(self.model)):
            return AutoTokenizer.from_pretrained(locate(self.model, weights=False), trust_remote_code=self._remote)

    # --- export

    @torch.no_grad()
    def export(self, net: nn.Module, base: State, folder: Path, heads: Mapping[str, TaskModule]) -> None:
        whole = self._loaded(base)
        tower = dict(net.state_dict())
        dtype = next(tensor.dtype for tensor in tower.values() if tensor.is_floating_point())
        scalars = {name: p for name, p in whole.named_parameters() if p.dim() == 0 or p.numel() == 1}
        values = {name: deepcopy(tensor) for name, tensor in scalars.items()}
        whole.to(dtype)
        for name, value in values.items():  # an exponent rounded to bf16 would be off by a percent
            whole.get_parameter(name).data = value.data
        state = whole.state_dict()
        for name, tensor in tower.items():
            state[name].copy_(tensor)
        with torch.device("meta"):
            layout = Layout.of(self._make(self._config()))
        FolderWriter(layout, locate(self.model, weights=False)).whole(whole, folder, self.config, type(whole).__name__)

        named = {f"{task}.{name}": p for task, head in heads.items() for name, p in head.named_parameters()}
        save_file({n: p.detach().cpu().contiguous() for n, p in named.items()}, folder / "heads.safetensors")

    def loading(self, task: str) -> str:
        weight, bias = (literal(f"{task}.{name}", template=True) for name in ("weight", "bias"))
        return f"""import json
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel

folder = "{{folder}}"
model, processor = AutoModel.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
heads = load_file(folder + "/heads.safetensors")
found = model.get_image_features(**processor(Image.open("picture.png"), return_tensors="pt"))
features = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=-1)
logits = features @ heads[{weight}].T + heads[{bias}]
print(json.load(open(folder + "/tasks.json"))[{literal(task, template=True)}]["classes"][int(logits.argmax())])"""

    def exported(self, folder: Path) -> nn.Module:
        return Tower(self._pretrained(folder, str(folder))).eval()

    def exported_heads(self, folder: Path, classes: Mapping[str, Sequence[str]]) -> Mapping[str, TaskModule]:
        clip = self._pretrained(folder, str(folder))
        return {
            task: head_of(TaskInfo(task, names), embedded(clip, self._tokens, names, self.templates(task)))
            for task, names in classes.items()
        }


class Tower(nn.Module):
    """Pixels [B, 3, H, W] -> embedding [B, D]: the vision part of a whole model, under the whole's names."""

    def __init__(self, whole: Any) -> None:
        super().__init__()
        self.vision_model = whole.vision_model
        self.visual_projection = getattr(whole, "visual_projection", None)

    def forward(self, pixel_values: Tensor) -> Tensor:
        pooled = self.vision_model(pixel_values=pixel_values).pooler_output
        return pooled if self.visual_projection is None else self.visual_projection(pooled)


@torch.no_grad()
def embedded(clip: Any, tokens: Any, classes: Sequence[str], templates: Sequence[str]) -> dict[str, Tensor]:
    """A zero-shot head's tensors: embeddings [C, D], scale [], bias []."""
    rows = []
    for start in range(0, len(classes), 64):
        some_classes = classes[start : start + 64]
        made = tokens([template.replace("{}", name) for name in some_classes for template in templates])
        found = clip.get_text_features(**made)
        found = found if isinstance(found, Tensor) else found.pooler_output
        each = F.normalize(found.float(), dim=-1).view(len(some_classes), len(templates), -1)
        rows.append(F.normalize(each.mean(1), dim=-1))
    scale, bias = clip.logit_scale.detach().exp(), getattr(clip, "logit_bias", None)
    bias = torch.zeros(()) if bias is None else bias.detach()
    return {"weight": torch.cat(rows), "scale": scale.float().reshape(()), "bias": bias.float().reshape(())}
