"""Images as pixels: resized and cropped by the checkpoint's own processor, normalised on the device."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from adamerge.backbones.explained import explained
from adamerge.checkpoints import locate
from adamerge.types import Batch, InputError

if TYPE_CHECKING:
    from adamerge.backbones.transformers import Transformers

    _Base = Transformers
else:
    _Base = object

PIXELS = "pixel_values"
_PLAIN = {"do_rescale": False, "do_normalize": False}  # asks a processor for bytes


class ImageInput(_Base):
    """The part of a backbone that takes images; stands before `Transformers` among the bases.

    A batch holds `pixel_values` [B, 3, H, W]: bytes, which are scaled and normalised in `inputs`, or floating numbers
    that are so already.
    """

    @cached_property
    def processor(self) -> Any:
        """The model's own image processor.

        Raises:
            InputError: There is none.
        """
        from transformers import AutoImageProcessor

        with explained(f"The image processor of '{self.model}' cannot be had", self._code_of(self.model)):
            folder = locate(self.model, weights=False)
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=self._remote)

    def prepare(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        if PIXELS in sample:
            return sample
        image = sample.get("image")
        if image is None:
            raise InputError(
                f"A sample has no image, but {', '.join(sorted(sample))}; say in `columns` of the data which column is "
                "the `image`."
            )
        rest = {"label": sample["label"]} if "label" in sample else {}
        return {PIXELS: image if isinstance(image, Tensor) else self._pixels(image), **rest}

    def _pixels(self, image: Any) -> Tensor:
        image = eight_bits(image).convert("L" if self._channels == 1 else "RGB")
        return self._processed(image, **_PLAIN).to(torch.uint8) if self._takes_bytes else self._processed(image).float()

    def _processed(self, image: Any, **options: bool) -> Tensor:
        return torch.as_tensor(np.asarray(self.processor(image, **options)[PIXELS][0]))

    @cached_property
    def _takes_bytes(self) -> bool:
        """Tell whether `inputs` scales and normalises bytes as the processor does; tried on one picture."""
        values = np.random.RandomState(0).randint(0, 256, (64, 48, 3)).astype(np.uint8)
        picture = Image.fromarray(values).convert("L" if self._channels == 1 else "RGB")
        whole = self._processed(picture).float()
        try:
            plain = self._processed(picture, **_PLAIN)
            found = self.inputs({PIXELS: plain.to(torch.uint8)[None]})[PIXELS][0]
        except Exception:  # a processor of its own kind: what it makes of a picture is taken as it is
            return False
        same = bool((plain == plain.to(torch.uint8)).all()) and found.shape == whole.shape
        return same and torch.allclose(found, whole, atol=1e-4)

    @property
    def _channels(self) -> int:
        return int(getattr(getattr(self.config, "vision_config", self.config), "num_channels", 3))

    @cached_property
    def _scale(self) -> tuple[float, Tensor, Tensor]:
        mean, std = (torch.tensor(getattr(self.processor, n))[:, None, None] for n in ("image_mean", "image_std"))
        return float(self.processor.rescale_factor), mean, std

    def inputs(self, batch: Batch) -> Mapping[str, Tensor]:
        if PIXELS not in batch:
            raise InputError(f"A batch holds {', '.join(sorted(batch))}, no `{PIXELS}`: its samples were not prepared.")
        pixels = batch[PIXELS]
        if pixels.dtype == torch.uint8:
            factor, mean, std = self._scale
            pixels = (pixels.float() * factor - mean.to(pixels.device)) / std.to(pixels.device)
        return {PIXELS: pixels}

    @property
    def tokens_per_sample(self) -> int | None:
        config = getattr(self.config, "vision_config", self.config)
        size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
        return (size // patch) ** 2 + 1 if isinstance(size, int) and isinstance(patch, int) else None

    def example(self, net: nn.Module, number: int) -> Batch:
        config = getattr(self.config, "vision_config", self.config)
        size = getattr(config, "image_size", 224)
        shape = (size, size) if isinstance(size, int) else tuple(size)
        generator = torch.Generator().manual_seed(0)
        return {PIXELS: torch.randn(number, self._channels, *shape, generator=generator)}


def eight_bits(image: Any) -> Any:
    """A PIL image with 16 bits a channel as one with 8; PIL itself would cut all values at 255.

    Raises:
        InputError: Numbers of no fixed range, or a mode that PIL makes no colours of.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F", "La"):
        kind = "32-bit numbers of no fixed range" if image.mode != "La" else "grey with its alpha multiplied in"
        name = getattr(image, "filename", "") or "An image"
        raise InputError(f"{name} is of mode {image.mode}, {kind}; save it with 8 bits, as grey or RGB.")
    return image.convert("RGB") if image.mode == "LAB" else image
