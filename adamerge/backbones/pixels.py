"""Images as pixels: resized and cropped by the checkpoint's own processor, normalised on the device."""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
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

        with explained(f"The image processor of '{self.model}' cannot be had"):
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
        return {PIXELS: image if isinstance(image, Tensor) else self._pixels(image.convert("RGB")), **rest}

    def _pixels(self, image: Any) -> Tensor:
        raw = torch.as_tensor(np.asarray(self.processor(image, **self._plain)[PIXELS][0]))
        if self._plain and not bool((raw == raw.round()).all()):  # not the bytes that were asked for
            raw = torch.as_tensor(np.asarray(self.processor(image)[PIXELS][0]))
            return raw.float()
        return raw.clamp(0, 255).to(torch.uint8) if self._plain else raw.float()

    @cached_property
    def _plain(self) -> dict[str, bool]:
        """How the processor is asked for bytes, where it would scale and normalise as `inputs` does."""
        usual = getattr(self.processor, "do_rescale", False) and getattr(self.processor, "do_normalize", False)
        return {"do_rescale": False, "do_normalize": False} if usual else {}

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
        return {PIXELS: torch.randn(number, getattr(config, "num_channels", 3), *shape, generator=generator)}
