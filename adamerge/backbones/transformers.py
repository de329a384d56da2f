"""Checkpoints of transformers: any architecture that its auto classes make, with names taken from the model itself."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from adamerge.backbones.base import Backbone
from adamerge.backbones.explained import explained
from adamerge.backbones.folder import FolderWriter
from adamerge.backbones.foreign_code import REMOTE, is_kernel, refuse_kernels
from adamerge.backbones.layout import Layout
from adamerge.blocks import block_names
from adamerge.checkpoints import PICKLES, State, absolute, locate, open_headers, open_state
from adamerge.files import sha256
from adamerge.reading import read_json
from adamerge.task_modules import TaskModule
from adamerge.types import InputError

# What may differ between a base and its fine-tunes without another network coming of it.
_FREE = re.compile(
    r"drop|init|label|problem_type|token_id|finetuning|checkpointing|vocab_size|projection_dim|use_cache|^output_|^return_"
)
ADAPTER = "adapter_config.json"
_COUNTED, _MOST = re.compile(r"(?i)layer|label|depth|block|stage"), 1_000_000  # keys of what becomes lists
_SETTINGS = (".json", ".txt", ".model", ".jinja")  # of architecture, preprocessing and tokenizer


class Transformers(Backbone):
    """Base of the backbones over transformers: the network is what an auto class makes of a configuration.

    Args:
        model: Where architecture and preprocessing come from: a folder, or a hub id with or without `@revision`. By
            default the merge's base.
        attention: Attention implementation, as transformers names them; by default the fastest it finds.
        remote_code: Run code that the model's folder brings along. Only for models you trust as you would code.
        blocks: Regular expression of the whole names of the network's blocks; by default the parts of its largest
            `nn.ModuleList`.

    Attributes:
        auto: The name of the auto class.
    """

    auto: ClassVar[str]
    library = "transformers"

    def __init__(
        self,
        model: str | None = None,
        *,
        attention: str | None = None,
        remote_code: bool = False,
        blocks: str | None = None,
    ) -> None:
        self._model, self._attention, self._remote, self._blocks = model, attention, remote_code, blocks
        if model is not None:
            self.bind(model)

    def bind(self, base: str) -> None:
        if self._model is None or self._model == base:
            self._arguments["model"] = self._model = absolute(base)

    @classmethod
    def foreign_code(cls, options: Mapping[str, Any]) -> list[str]:
        attention = options.get("attention")
        return [*super().foreign_code(options), *([f"attention: {attention}"] if is_kernel(attention) else [])]

    def _code_of(self, source: str) -> str | None:
        """The source, where its code may run."""
        return source if self._remote else None

    @property
    def model(self) -> str:
        """The source of architecture and preprocessing: a folder or a hub id."""
        if self._model is None:
            raise InputError(f"{type(self).__name__} has no `model`; name a folder or a hub id.")
        return self._model

    def made_of(self) -> Sequence[Any] | None:
        if self._remote:
            return None
        files = sorted(file for file in locate(self.model, weights=False).iterdir() if file.suffix in _SETTINGS)
        return [[file.name, sha256(file)] for file in files]

    # --- the network

    def config_of(self, source: str) -> Any:
        """The configuration of a checkpoint; of a hub's, nothing but small files is fetched.

        Raises:
            InputError: There is none, or it needs remote code that was not asked for.
        """
        from transformers import AutoConfig

        with explained(f"The configuration of '{source}' cannot be had", self._code_of(source)):
            folder = locate(source, weights=False)
            if not (folder / "config.json").is_file():
                raise InputError(
                    f"'{source}' has no config.json. Name a folder or hub id that `save_pretrained` has written; for a "
                    "base that is a file alone, name one in `backbone.model`."
                )
            _check_counts(read_json(folder / "config.json"), str(folder / "config.json"))
            if not self._remote:
                refuse_kernels(folder)
            try:
                return AutoConfig.from_pretrained(folder, trust_remote_code=self._remote)
            except ValueError as error:
                if self._remote or REMOTE not in str(error):
                    raise
                raise InputError(
                    f"'{source}' is of an architecture that transformers does not have: it brings code of its own. "
                    "Read that, and if you trust it, set `backbone.remote_code` to true."
                ) from error

    @cached_property
    def config(self) -> Any:
        """The configuration of the model."""
        return self.config_of(self.model)

    def _config(self) -> Any:
        """The one the network is made from."""
        return deepcopy(self.config)

    def _make(self, config: Any) -> Any:
        """The library's own network, with any values."""
        import transformers

        options = {"attn_implementation": self._attention} if self._attention else {}
        with explained(f"transformers cannot make '{self.model}' by {self.auto}", self._code_of(self.model)):
            auto = getattr(transformers, self.auto)
            net = auto.from_config(config, trust_remote_code=self._remote, dtype=torch.float32, **options)
        tied = _tied_output(net)
        if tied is not None and self._is_untied:
            tied.weight = nn.Parameter(torch.empty_like(tied.weight))
        return net

    @cached_property
    def _is_untied(self) -> bool:
        """Tell whether the output layer is no embedding, whatever the library makes: transformers 5 ties each T5's."""
        told = read_json(locate(self.model, weights=False) / "config.json")
        return told.get("tie_word_embeddings") is False

    def build(self) -> nn.Module:
        return self._make(self._config()).eval()

    @cached_property
    def layout(self) -> Layout:
        """The names of the network's tensors."""
        with torch.device("meta"):
            return Layout.of(self._make(self._config()))

    def own(self, base: State) -> Mapping[str, str]:
        own = dict.fromkeys(self.layout.own, "each task's own")
        return own | dict.fromkeys(self.layout.pooler_not_in(base), "each task's own, not in the base")

    def blocks(self, net: nn.Module) -> Sequence[str]:
        return block_names(net, self._blocks)

    def open(self, source: str) -> State:
        return self.layout.select(open_state(source))

    def peek(self, source: str) -> State:
        return self.layout.select(open_headers(source), say=False)

    def outline(self) -> nn.Module:
        with torch.device("meta"):
            return self.build()

    def differences(self, source: str) -> Iterator[str]:
        if not has_config(source):
            return  # weights alone: their names and shapes are compared
        whole = self.config_of(source)
        ours, theirs = self.compared(self.config), self.compared(whole)
        if ours.model_type != theirs.model_type:  # nothing else can be compared
            raise InputError(
                f"{source} is a {theirs.model_type}, `backbone.model` '{self.model}' a {ours.model_type}. Merge "
                "fine-tunes of one model."
            )
        if getattr(whole, "quantization_config", None) is not None:
            yield (
                f"{source} is quantised, and quantised weights have no task vector. Name the checkpoint that it was "
                "made from, or one that was dequantised."
            )
        wrong = _differing(ours, theirs)
        if wrong:
            yield (
                f"{source} is configured otherwise than `backbone.model` '{self.model}': {'; '.join(wrong[:4])}. "
                "Merge fine-tunes of one model, or mend its config.json where it is wrong."
            )

    def compared(self, config: Any) -> Any:
        """The part of a configuration that says what is merged. Default: all of it."""
        return config

    # --- export

    def export(self, net: nn.Module, base: State, folder: Path, heads: Mapping[str, TaskModule]) -> None:
        writer = FolderWriter(self.layout, locate(self.model, weights=False))
        writer.whole(net, folder, self.config, type(net).__name__)
        if self._is_untied:  # which transformers 5 has forgotten
            told = {**json.loads((folder / "config.json").read_text()), "tie_word_embeddings": False}
            (folder / "config.json").write_text(json.dumps(told, indent=2, sort_keys=True))

    def exported(self, folder: Path) -> nn.Module:
        return self._pretrained(folder, str(folder))

    def _pretrained(self, folder: Path, source: str) -> Any:
        """Load the library's own network with the weights of a folder.

        Args:
            folder: The folder.
            source: What it was named by.

        Raises:
            InputError: It does not load, or is an adapter.
        """
        import transformers

        if (folder / ADAPTER).is_file():  # it would name another model, and modules to import
            raise InputError(
                f"'{source}' has an {ADAPTER}: it is an adapter to another model. Merge it into that one (in peft: "
                "`merge_and_unload`), and name the model that comes of it."
            )
        with explained(f"'{source}' cannot be loaded by {self.auto}", self._code_of(source)):
            if not self._remote:
                refuse_kernels(folder)
            auto = getattr(transformers, self.auto)
            return auto.from_pretrained(folder, trust_remote_code=self._remote, dtype=torch.float32).eval()


def _check_counts(told: Any, source: str) -> None:
    """Refuse numbers of layers and labels that no model has: transformers would make lists of that length.

    Raises:
        InputError: There is one.
    """
    values = [("", told)]
    while values:
        key, value = values.pop()
        if isinstance(value, (int, float)) and value > _MOST and _COUNTED.search(key):
            raise InputError(f"{source} has `{key}` {value:,}, and no model has more than {_MOST:,}; mend the file.")
        if isinstance(value, dict):
            values += value.items()
        elif isinstance(value, list):
            values += ((key, each) for each in value)


def _tied_output(net: Any) -> nn.Linear | None:
    """The output layer, where its weight is that of the embeddings."""
    try:
        inner, output = net.get_input_embeddings(), net.get_output_embeddings()
    except NotImplementedError:  # a network without tokens
        return None
    weight = getattr(output, "weight", None)
    return output if weight is not None and weight is getattr(inner, "weight", None) else None


def has_config(source: str) -> bool:
    """Tell whether a source is more than weights: a hub id, or a folder with a configuration."""
    path = Path(source.removeprefix("local-dir:")).expanduser()
    return (path / "config.json").is_file() if path.exists() else not source.endswith((".safetensors", *PICKLES))


def _differing(ours: Any, theirs: Any) -> list[str]:
    """The options that make another network of two configurations of one kind, as far as their class knows them."""
    from transformers import PretrainedConfig

    known = set(type(ours)().to_dict())
    free = set(PretrainedConfig().to_dict()) - {"tie_word_embeddings"} | {"transformers_version", "_name_or_path"}
    a, b = ({k: v for k, v in config.to_dict().items() if k in known} for config in (ours, theirs))
    return list(_unequal(a, b, free))


def _unequal(ours: Mapping[str, Any], theirs: Mapping[str, Any], free: set[str], prefix: str = "") -> Iterator[str]:
    for key in {**ours, **theirs}:
        a, b = ours.get(key), theirs.get(key)
        if key in free or _FREE.search(key) or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _unequal(a, b, free, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} is {b}, not {a}"
