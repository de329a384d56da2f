"""Folders that transformers loads: weights in shards, configuration, tokenizer or processor, heads."""

import copy
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from adamerge.backbones.layout import Layout
from adamerge.modules import identity
from adamerge.naming import folder_of

SHARD = "5GB"
TOKENIZER = (
    *("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "*.model", "spiece*"),
    *("chat_template*",),
)
_BESIDE = (*TOKENIZER, "preprocessor_config.json", "processor_config.json", "generation_config.json")


class FolderWriter:
    """Writes networks as `save_pretrained` does; the weights that tasks share are on the disk once.

    Args:
        layout: The names of the network's tensors.
        source: The folder whose tokenizer, processor and generation settings go along.
    """

    def __init__(self, layout: Layout, source: Path) -> None:
        self._layout, self._source = layout, source
        self._shards: dict[str, list[str]] = {}
        self._root, self._dtype = Path(), torch.float32

    def whole(
        self, net: nn.Module, folder: Path, config: Any, architecture: str, *, without: Collection[str] = ()
    ) -> None:
        """Write the part of a network that all tasks share into the folder itself.

        Args:
            net: The network.
            folder: Where.
            config: Its configuration.
            architecture: The class that loads it.
            without: Names of tensors that are each task's own.
        """
        own, seen = set(without), set()
        state: dict[str, Tensor] = {}
        for name, tensor in net.state_dict().items():
            if name in own or identity(tensor) in seen:
                continue
            seen.add(identity(tensor))
            state[self._layout.stored.get(name, name)] = tensor.detach().cpu().contiguous()
        split = split_torch_state_dict_into_shards(state, max_shard_size=SHARD)
        self._root, self._shards = folder, split.filename_to_tensors
        for file, names in self._shards.items():
            save_file({name: state[name] for name in names}, folder / file, metadata={"format": "pt"})
        if split.is_sharded:
            _write_index(folder, {name: file for file, names in self._shards.items() for name in names})
        self._dtype = max((t for t in state.values() if t.is_floating_point()), key=Tensor.numel).dtype
        self._describe(folder, config, architecture)

    def task(self, folder: Path, task: str, config: Any, architecture: str, head: Mapping[str, Tensor]) -> None:
        """A whole model for one task in `tasks/TASK`: links to the shared files, and a file with the task's head."""
        home = folder / "tasks" / folder_of(task)
        home.mkdir(parents=True)
        number = len(self._shards) + 1
        index: dict[str, str] = {}
        for place, (file, names) in enumerate(self._shards.items(), start=1):
            shard = f"model-{place:05d}-of-{number:05d}.safetensors"
            _link(self._root / file, home / shard)
            index |= dict.fromkeys(names, shard)
        last = f"model-{number:05d}-of-{number:05d}.safetensors"
        own = {
            self._layout.stored.get(name, name): tensor.detach().cpu().to(self._dtype).contiguous()
            for name, tensor in head.items()
        }
        save_file(own, home / last, metadata={"format": "pt"})
        _write_index(home, {**index, **dict.fromkeys(own, last)})
        self._describe(home, config, architecture)

    def _describe(self, folder: Path, config: Any, architecture: str) -> None:
        config = copy.deepcopy(config)
        config.architectures = [architecture]
        config.save_pretrained(folder)
        told = json.loads((folder / "config.json").read_text())
        key = "dtype" if "dtype" in told else "torch_dtype"
        told[key] = str(self._dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(told, indent=2, sort_keys=True))
        for file in {file for pattern in _BESIDE for file in self._source.glob(pattern) if file.is_file()}:
            shutil.copyfile(file, folder / file.name)


def _write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    size = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _link(file: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the disk has no links."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copyfile(file, target)
