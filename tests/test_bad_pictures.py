"""Pictures that cannot be read end in one sentence that names the file."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from adamerge.backbones.pixels import eight_bits
from adamerge.data import HFDataset, ImageFolder
from adamerge.types import InputError
from tests.test_convert_bombs import bounded


def saved(kind="PNG", mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def png(width, height, rows=b"", depth=8, colour=2):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def with_exif(content):
    return saved("JPEG", exif=b"Exif\0\0" + content)


def read(folder):
    samples = ImageFolder(str(folder)).split("train")
    return [eight_bits(samples[index]["image"]).convert("RGB").size for index in range(len(samples))]


NAMED = r"a\.png cannot be decoded|no readable images: 1 \(.*a\.png\)|a\.png is of mode"
PICTURES = {
    "nothing": b"",
    "no picture": b"hello",
    "cut short": saved()[:-30],
    "a head alone": saved()[:33],
    "more pixels than PIL decodes": png(30000, 30000),
    "more pixels than PIL decodes without a word": png(10000, 10000),
    "no pixels": png(0, 5),
    "a BMP without pixels": saved("BMP")[:18] + bytes(8) + saved("BMP")[26:],
    "numbers of 32 bits": saved("TIFF", "F"),
    "a text that unpacks to gigabytes": saved()[:33]
    + (lambda raw: struct.pack(">I", len(raw)) + b"zTXt" + raw + struct.pack(">I", zlib.crc32(b"zTXt" + raw)))(
        b"a\0\0" + zlib.compress(bytes(10**8))
    )
    + saved()[33:],
    "a drawing that runs Ghostscript": saved("EPS"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_one_sentence_names_the_file(tmp_path, name):
    (tmp_path / "train" / "c").mkdir(parents=True)
    (tmp_path / "train" / "c" / "a.png").write_bytes(PICTURES[name])
    with pytest.raises(InputError, match="limit of|MAX_IMAGE_PIXELS" if name.startswith("more pixels") else NAMED):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "gone", "loop"])
def test_what_is_no_file(tmp_path, kind):
    place = tmp_path / "train" / "c"
    place.mkdir(parents=True)
    if kind == "pipe":
        os.mkfifo(place / "a.png")
    elif kind == "folder":
        (place / "a.png").mkdir()
    else:
        (place / "a.png").symlink_to({"zero": "/dev/zero", "gone": tmp_path / "x", "loop": place / "a.png"}[kind])
    assert "a.png" in bounded(lambda: str(read(tmp_path)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "LAB", "I;16"])
def test_other_modes_are_read(tmp_path, mode):
    (tmp_path / "train").mkdir()
    kind = "PNG" if mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16") else "TIFF"
    picture = Image.new("I;16", (4, 4)) if mode == "I;16" else Image.new("L", (4, 4)).convert("RGB").convert(
        mode if mode not in ("PA", "LAB") else "RGB"
    )  # fmt: skip
    picture.save(tmp_path / "train" / f"a.{kind.lower()}")
    assert read(tmp_path) == [(4, 4)]


def test_garbage_for_a_turn_names_the_file_or_does_not_matter(tmp_path):
    (tmp_path / "train").mkdir()
    for number, garbage in enumerate((b"", b"MM", b"II*\0" + b"\xff" * 40, b"II*\0\x08\0\0\0\x01\0\x12\1\2\0\xff\xff")):
        (tmp_path / "train" / "a.jpg").write_bytes(with_exif(garbage))
        said = bounded(lambda: str(read(tmp_path)))
        assert said == "[(4, 4)]" or "a.jpg cannot be decoded" in said, (number, said)


@pytest.mark.parametrize("content", [b"hello", saved()[:-30], png(0, 5), png(30000, 30000), png(10000, 10000)])
def test_columns_of_pictures(tmp_path, content):
    from datasets import Dataset, DatasetDict, Features, Value
    from datasets import Image as Picture

    images = [{"bytes": each, "path": None} for each in (saved(), content)]
    features = Features({"image": Picture(), "label": Value("int64")})
    rows = Dataset.from_dict({"image": images, "label": [0, 1]}, features=features)
    DatasetDict({"train": rows}).save_to_disk(tmp_path / "d")
    samples = HFDataset(str(tmp_path / "d")).split("train")
    assert samples[0]["image"].size == (4, 4)
    for ask in (lambda: samples[1], lambda: samples.__getitems__([0, 1])):
        with pytest.raises(InputError, match=r"Sample 1 of .* cannot be decoded"):
            ask()
