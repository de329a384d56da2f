"""The doors of `tests.fuzz`: what examples are made of, and how each goes in."""

import atexit
import hashlib
import io
import json
import pickle
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch import nn

from tests.fuzz import Door
from tests.mutations import changed_bytes, changed_json, changed_pickle, changed_safetensors, changed_tree, changed_zip
from tests.tiny import Net, TiedNet, config_of, write_pool


@st.composite
def _one(draw: st.DrawFn, **strategies: Any) -> dict[str, bytes]:
    return {name: draw(strategy) for name, strategy in strategies.items()}


def _saved(value: Any, *, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def _scripted() -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()), file)
    return file.getvalue()


# --- convert


def convert_door() -> Door:
    """Pickled checkpoints: zip archives, flat files, single pickles, TorchScript, whole modules."""
    from adamerge.convert import convert

    plain = {
        "state_dict": TiedNet().state_dict(),
        "a": np.arange(6.0).reshape(2, 3),
        "s": {1, "b"},
        "r": (1, 2.5, None),
    }
    arrays = {"w": np.ones((2, 3), np.float32), "b": np.arange(3, dtype=">i4")}
    zips = [_saved(plain), _saved({"model": Net()}), _saved(Net().state_dict()), _scripted()]
    flats = [_saved(plain, zipped=False), _saved({"model": Net()}, zipped=False)]
    pickles = [pickle.dumps(arrays, protocol) for protocol in (0, 2, 4, 5)]
    contents = st.one_of(
        *map(changed_zip, zips), *map(changed_bytes, flats), *map(changed_pickle, pickles), *map(changed_bytes, pickles)
    )

    def enter(folder: Path, out: Path) -> None:
        convert(folder / "a.pt", out / "a.safetensors", modules=True)

    return Door(st.fixed_dictionaries({"a.pt": contents}), enter)


# --- images


def _pictures() -> list[bytes]:
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 256, (9, 7, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    ways: list[tuple[str, str, dict[str, Any]]] = [
        *(("PNG", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16", "I")),
        *(("PNG", "RGB", {"exif": exif}), ("JPEG", "RGB", {"exif": exif}), ("JPEG", "RGB", {"progressive": True})),
        *(("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("GIF", "P", {}), ("BMP", "RGB", {}), ("BMP", "1", {})),
        *(("TIFF", "RGB", {"compression": name}) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits")),
        *(("TIFF", mode, {}) for mode in ("F", "I;16", "CMYK", "LAB")),
        *(("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}), ("PPM", "RGB", {}), ("TGA", "RGB", {"rle": True})),
        *(("ICO", "RGBA", {}), ("PCX", "RGB", {}), ("SGI", "RGB", {}), ("DDS", "RGBA", {}), ("JPEG2000", "RGB", {})),
        *(("GIF", "P", {"save_all": True, "append_images": [picture.convert("P")]}), ("ICNS", "RGBA", {})),
        *(("QOI", "RGB", {}), ("IM", "RGB", {}), ("MSP", "1", {}), ("XBM", "1", {}), ("EPS", "RGB", {})),
    ]
    made = []
    for kind, mode, options in ways:
        file = io.BytesIO()
        try:
            source = picture.convert("L").convert(mode) if mode in ("I;16", "I", "F", "LAB") else picture.convert(mode)
            source.save(file, kind, **options)
        except (OSError, ValueError, KeyError):  # not every build of PIL writes each of them
            continue
        made.append(file.getvalue())
    return made


def images_door() -> Door:
    """Pictures of every format in a folder, under names of other formats too."""
    from adamerge.backbones.pixels import eight_bits
    from adamerge.data import ImageFolder

    contents = st.one_of(*map(changed_bytes, _pictures()))
    names = st.sampled_from(("a.png", "a.jpg", "a.gif", "a.tif", "a.webp", "a.bmp"))

    def enter(folder: Path, out: Path) -> None:
        samples = ImageFolder(str(folder)).split("train")
        for index in range(len(samples)):  # type: ignore[arg-type]
            assert eight_bits(samples[index]["image"]).convert("RGB").getbbox() != ()

    files = st.builds(lambda name, content: {f"train/c/{name}": content}, names, contents)
    return Door(files, enter, memory=800 * 2**20)  # two copies of the largest picture that PIL decodes without a word


# --- checkpoints in safetensors


def index_door() -> Door:
    """Indices of shards, and the headers of safetensors files: every tensor is opened."""
    from adamerge.checkpoints import open_headers, open_state

    first = save({"a": torch.ones(2, 3), "b": torch.arange(4)})
    second = save({"c": torch.ones(1, dtype=torch.float16), "d": torch.zeros(0, 2)})
    index = {"metadata": {"total_size": 58}, "weight_map": {"a": "1.safetensors", "b": "1.safetensors"}}
    index["weight_map"] |= dict.fromkeys("cd", "2.safetensors")
    plain = json.dumps(index).encode()
    name = "model.safetensors.index.json"
    whole = {name: st.just(plain), "1.safetensors": st.just(first), "2.safetensors": st.just(second)}
    files = st.one_of(
        st.fixed_dictionaries({**whole, name: changed_json(index)}),
        st.fixed_dictionaries({**whole, "1.safetensors": changed_safetensors(first)}),
        st.fixed_dictionaries({**whole, "2.safetensors": changed_safetensors(second)}),
        st.fixed_dictionaries({"model.safetensors": changed_safetensors(first)}),
    )

    def enter(folder: Path, out: Path) -> None:
        for state in (open_headers(str(folder)), open_state(folder)):
            for tensor in state:
                state.meta(tensor)
                state[tensor].sum()

    return Door(files, enter)


# --- merges, configurations


@cache
def _merge() -> dict[str, bytes]:
    """A tiny learned merge with its sources, made once per process; paths in it are as the folder `POOL` has them."""
    import adamerge

    folder = Path(tempfile.mkdtemp(prefix="adamerge-fuzz-pool-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    plain = config_of(write_pool(folder))
    plain["run"] = {"baselines": False, "root": str(folder / "runs"), "name": "run"}
    plain["trainer"] |= {"max_steps": 1, "logger": False, "enable_progress_bar": False}
    done = Path(adamerge.train(plain).dir)
    names = ("merge/merge.yaml", "merge/merge.safetensors", "config.yaml")
    return {name: (done / name).read_bytes() for name in names}


def _texts(name: str) -> Any:
    """A YAML file of the merge with other data, or other bytes."""
    content = _merge()[name]
    trees = changed_tree(yaml.safe_load(content)).map(
        lambda tree: yaml.dump(tree, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")
    )
    return st.one_of(trees, trees, changed_bytes(content))


def load_door() -> Door:
    """A saved merge, loaded: its record or its learnables changed, the digest of these as it then is."""
    import adamerge

    def with_digest(files: dict[str, bytes]) -> dict[str, bytes]:
        old, new = (hashlib.sha256(content).hexdigest().encode() for content in (whole_weights, files[weights]))
        return {**files, record: files[record].replace(old, new)}

    record, weights = "merge/merge.yaml", "merge/merge.safetensors"
    whole_weights = _merge()[weights]
    whole = {name: st.just(content) for name, content in _merge().items()}
    files = st.one_of(
        st.fixed_dictionaries({**whole, record: _texts(record)}),
        st.fixed_dictionaries({**whole, record: _texts(record)}),
        st.fixed_dictionaries({**whole, weights: changed_safetensors(whole_weights)}).map(with_digest),
    )

    def enter(folder: Path, out: Path) -> None:
        adamerge.load(folder, trust=True)

    return Door(files, enter)


def config_door() -> Door:
    """A user's configuration, parsed."""
    from adamerge.config import parse

    def enter(folder: Path, out: Path) -> None:
        parse(folder / "config.yaml", {})

    return Door(st.fixed_dictionaries({"config.yaml": _texts("config.yaml")}), enter)


def evaluate_door() -> Door:
    """A run's configuration, of which `evaluate` makes the data again."""
    from adamerge.config import data_of

    def enter(folder: Path, out: Path) -> None:
        data_of(folder / "config.yaml", trust=True)

    return Door(st.fixed_dictionaries({"config.yaml": _texts("config.yaml")}), enter)


DOORS: dict[str, Callable[[], Door]] = {
    **{"convert": convert_door, "images": images_door, "index": index_door},
    **{"load": load_door, "config": config_door, "evaluate": evaluate_door},
}
