"""Pictures in files, opened and decoded within limits, whatever the files hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from adamerge.reading import open_regular
from adamerge.types import InputError

SUFFIXES = frozenset(Image.registered_extensions())
_OF_PROGRAMS = {"EPS", "WMF", "BUFR", "GRIB", "HDF5"}  # drawn by other programs, Ghostscript among them
_FORMATS = tuple(sorted(set(Image.OPEN) - _OF_PROGRAMS))


def decoded(file: Path) -> Any:
    """Return the picture in a file as a PIL image, turned as its camera was held.

    Raises:
        InputError: No regular file, one that cannot be read or decoded, a picture without pixels, or with more than
            `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    with _opened(file) as image:
        image.load()
        picture: Any = ImageOps.exif_transpose(image)
        picture.filename = str(file)  # for messages
        return picture


def is_picture(file: Path) -> bool:
    """Tell whether a file begins as a picture does; size and pixels are checked when it is decoded."""
    try:
        with open_regular(file) as raw, Image.open(raw, formats=_FORMATS):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # the formats' own readers fail in any way on a damaged header
        return False


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with open_regular(file) as raw, Image.open(raw, formats=_FORMATS) as image:
            check_size(image)
            yield image
    except Exception as error:  # the formats' own readers fail in any way on a damaged picture
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"The image {file} cannot be decoded ({reason}); remove or replace it.") from error


def check_size(image: Any) -> None:
    """Refuse a picture that has no pixels, or so many that they would fill the memory.

    Raises:
        ValueError: The picture is empty or too large.
    """
    width, height = image.size
    limit = Image.MAX_IMAGE_PIXELS
    if width < 1 or height < 1:
        raise ValueError(f"it has {width} × {height} pixels")
    if limit is not None and width * height > limit:
        raise ValueError(f"it has {width} × {height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {limit:,}")
