"""The files of the demo pools that come with the package, so that a pool is the same bits on every machine.

`pools/POOL` holds what training made once: weights in half precision, from which nothing is lost because every model is
rounded before it is scored, and pictures as bytes. On first use they are unpacked into the cache folder, in fp32 and in
the layouts that users have. `python -m adamerge.demo POOL FOLDER` trains them anew.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

POOLS = Path(__file__).parent / "pools"
_ROW = 25  # pictures side by side on a sheet


def rounded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as they come back from the package: rounded to half precision, in fp32.

    Raises:
        ValueError: A tensor has numbers that half precision does not reach.
    """
    kept = {name: tensor.detach().half().float().contiguous() for name, tensor in state.items()}
    beyond = [name for name, tensor in kept.items() if not tensor.isfinite().all()]
    if beyond:
        raise ValueError(f"Half precision does not hold {', '.join(beyond)}.")
    return kept


def save_half(state: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors in half precision; errors as for `rounded`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.half() for name, tensor in rounded(state).items()}, file)


def load_half(file: Path) -> dict[str, Tensor]:
    """Read the tensors of `save_half`, in fp32."""
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def save_sheet(images: npt.NDArray[np.uint8], file: Path) -> None:
    """Write pictures [N, H, W, 3] as one lossless picture, N a multiple of 25."""
    file.parent.mkdir(parents=True, exist_ok=True)
    number, height, width, channels = images.shape
    tiles = images.reshape(number // _ROW, _ROW, height, width, channels).transpose(0, 2, 1, 3, 4)
    sheet = Image.fromarray(tiles.reshape(number // _ROW * height, _ROW * width, channels))
    sheet.save(file, "WEBP", lossless=True, quality=75, method=4)


def load_sheet(file: Path, size: int) -> npt.NDArray[np.uint8]:
    """Read the pictures of `save_sheet`, [N, size, size, 3]."""
    with Image.open(file) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    tiles = pixels.reshape(len(pixels) // size, size, _ROW, size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(-1, size, size, 3))
