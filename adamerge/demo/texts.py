"""A small BERT and four text classifiers fine-tuned from it, shipped with the package.

`pools/texts` holds the weights in half precision, configurations and the tokenizer. On first use they are written into
the cache folder in the layouts that users have: transformers' folder for each model, its tokenizer beside it, and a
`datasets` folder for each task's texts, which are drawn there. `texts_training.py` made them.
"""

import shutil
from pathlib import Path

from safetensors.torch import save_file

from adamerge.demo.corpus import CLASSES, samples
from adamerge.demo.shipped import POOLS, load_half
from adamerge.files import built_once, cache_dir
from adamerge.types import InputError

VERSION = "2"  # part of the cache's path: raise it when anything here or in the corpus changes what is unpacked
_MODELS = ("base", *CLASSES)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def locate(name: str) -> Path:
    """Return the folder of `base`, of a task's expert, or of a task's texts (`data/TASK`), unpacked if not cached.

    Raises:
        InputError: No such model or task.
    """
    if name not in (*_MODELS, *(f"data/{task}" for task in CLASSES)):
        raise InputError(f"The texts have no '{name}'; they have {', '.join(_MODELS)}, and data/TASK for each task.")
    return built_once(cache_dir() / "demo" / f"texts-{VERSION}", unpack) / name


def unpack(folder: Path, shipped: Path = POOLS / "texts") -> None:
    """Write models in fp32 and texts into a folder; the same values on every platform.

    Args:
        folder: Where.
        shipped: The files that training wrote.
    """
    for name in _MODELS:
        (folder / name).mkdir(parents=True)
        shutil.copy(shipped / name / "config.json", folder / name)
        weights = load_half(shipped / name / "model.safetensors")
        save_file(weights, folder / name / "model.safetensors", metadata={"format": "pt"})
        for file in _TOKENIZER:
            shutil.copy(shipped / file, folder / name)
    for task in CLASSES:
        _save_texts(folder / "data" / task, task)


def _save_texts(folder: Path, task: str) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, disable_progress_bars, enable_progress_bars

    features = Features({"text": Value("string"), "label": ClassLabel(names=list(CLASSES[task]))})
    disable_progress_bars()
    splits = {
        split: Dataset.from_dict({"text": texts, "label": labels}, features=features)
        for split, (texts, labels) in samples(task).items()
    }
    DatasetDict(splits).save_to_disk(str(folder))
    enable_progress_bars()
