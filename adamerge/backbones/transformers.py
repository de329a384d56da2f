"""Checkpoints of transformers: any architecture that its auto classes make, with names taken from the model itself."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adamerge.backbones.base import Backbone
from adamerge.backbones.explained import explained
from adamerge.backbones.folder import FolderWriter
from adamerge.backbones.layout import Layout, output_layer
from adamerge.blocks import block_names
from adamerge.checkpoints import PICKLES, State, absolute, locate, open_headers, open_state
from adamerge.task_modules import ClassifierHead, TaskModule
from adamerge.types import Batch, InputError, TaskInfo, some

# What may differ between a base and its fine-tunes without another network coming of it.
_FREE = re.compile(
    r"drop|init|label|problem_type|token_id|finetuning|checkpointing|vocab_size|projection_dim|use_cache|^output_|^return_"
)
_REMOTE = "trust_remote_code"  # what transformers' complaint of a folder with code of its own contains


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

    @property
    def model(self) -> str:
        """Where architecture and preprocessing come from."""
        if self._model is None:
            raise InputError(f"{type(self).__name__} has no `model`; name a folder or a hub id.")
        return self._model

    # --- the network

    def config_of(self, source: str) -> Any:
        """The configuration of a checkpoint; of a hub's, nothing but small files is fetched.

        Raises:
            InputError: There is none, or it needs remote code that was not asked for.
        """
        from transformers import AutoConfig

        with explained(f"The configuration of '{source}' cannot be had"):
            folder = locate(source, weights=False)
            if not (folder / "config.json").is_file():
                raise InputError(
                    f"'{source}' has no config.json. Name a folder or hub id that `save_pretrained` has written; for a "
                    "base that is a file alone, name one in `backbone.model`."
                )
            try:
                return AutoConfig.from_pretrained(folder, trust_remote_code=self._remote)
            except ValueError as error:
                if self._remote or _REMOTE not in str(error):
                    raise
                raise InputError(
                    f"'{source}' is of an architecture that transformers does not have: it brings code of its own. "
                    "Read that, and if you trust it, set `backbone.remote_code` to true."
                ) from error

    @cached_property
    def config(self) -> Any:
        """That of the model."""
        return self.config_of(self.model)

    def _config(self) -> Any:
        """The one the network is made from."""
        return deepcopy(self.config)

    def _make(self, config: Any) -> Any:
        """The library's own network, with any values."""
        import transformers

        options = {"attn_implementation": self._attention} if self._attention else {}
        with explained(f"transformers cannot make '{self.model}' by {self.auto}"):
            auto = getattr(transformers, self.auto)
            net = auto.from_config(config, trust_remote_code=self._remote, dtype=torch.float32, **options)
        tied = _tied_output(net)
        if tied is not None and self._is_untied:
            tied.weight = nn.Parameter(torch.empty_like(tied.weight))
        return net

    @cached_property
    def _is_untied(self) -> bool:
        """Whether the output layer is no embedding, whatever the library makes: transformers 5 ties each T5's."""
        told = json.loads((locate(self.model, weights=False) / "config.json").read_text())
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
        if not _has_config(source):
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
        import transformers

        return getattr(transformers, self.auto).from_pretrained(folder, dtype=torch.float32).eval()


class Classifier(Transformers):
    """Base of the classifiers: the body is merged, and each task keeps its expert's head, whatever its classes."""

    has_heads = True

    def __init__(
        self,
        model: str | None = None,
        *,
        train_heads: bool = False,
        attention: str | None = None,
        remote_code: bool = False,
        blocks: str | None = None,
    ) -> None:
        super().__init__(model, attention=attention, remote_code=remote_code, blocks=blocks)
        self._train_heads = train_heads

    def _labelled(self, labels: int) -> Any:
        config = self._config()
        config.num_labels = labels
        return self._make(config)

    @cached_property
    def output(self) -> str:
        """The name of the layer that makes the logits."""
        with torch.device("meta"):
            return output_layer(self._labelled, f"The {self.config.model_type} of '{self.model}'")

    @cached_property
    def layout(self) -> Layout:
        with torch.device("meta"):
            return Layout.of(self._labelled(3), output=f"{self.output}.")

    def build(self) -> nn.Module:
        return self._bare(self._labelled(3))

    def _bare(self, net: nn.Module) -> nn.Module:
        """The network without its output layer, so that its logits are the features."""
        net.set_submodule(self.output, nn.Identity())
        return net.eval()

    def features(self, net: nn.Module, batch: Batch) -> Tensor:
        return net(**self.inputs(batch)).logits

    def inputs(self, batch: Batch) -> Mapping[str, Tensor]:
        """What the network takes of a batch."""
        raise NotImplementedError

    def head(self, task: TaskInfo) -> TaskModule:
        assert isinstance(task.base, State)
        prefix = f"{self.output}."
        inner = [name for name in self.own(task.base) if not name.startswith(prefix)]
        return ClassifierHead(task, prefix=prefix, inner=inner, trainable=self._train_heads)

    def head_problems(self, task: str, state: State, classes: Sequence[str]) -> Iterator[str]:
        name = f"{self.output}.weight"
        inner = [each for each in self.layout.own if each not in state and not each.startswith(f"{self.output}.")]
        if name in state and inner:
            yield f"Task '{task}': {state.source} lacks {some(inner)} of its head; give one that was saved whole."
        if name not in state:
            yield f"Task '{task}': {state.source} has no head '{name}'; give an expert that was saved with its head."
        elif classes and state.meta(name)[0][0] != len(classes):
            yield f"Task '{task}' has {len(classes)} classes, its head in {state.source} {state.meta(name)[0][0]}."

    def classes(self, source: str, given: Sequence[str]) -> Sequence[str]:
        if not _has_config(source):
            return given
        names = [str(name) for _, name in sorted(self.config_of(source).id2label.items())]
        if not given:
            return names
        unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in names)
        plain = [[re.sub(r"[\W_]+", " ", name).strip().lower() for name in each] for each in (given, names)]
        if not unnamed and plain[0] != plain[1] and sorted(plain[0]) == sorted(plain[1]):
            raise InputError(
                f"{source} numbers its classes {', '.join(names[:4])}; the data number them {', '.join(given[:4])}. "
                "Give the labels of the data in the expert's order."
            )
        return given

    def export(self, net: nn.Module, base: State, folder: Path, heads: Mapping[str, TaskModule]) -> None:
        writer = FolderWriter(self.layout, locate(self.model, weights=False))
        body = net.base_model if self.layout.body else net
        writer.whole(net, folder, self.config, type(body).__name__, without=self.layout.own)
        for task, head in heads.items():
            assert isinstance(head, ClassifierHead)
            config = self._config()
            config.id2label = dict(enumerate(head.classes or [f"LABEL_{c}" for c in range(len(head.weight))]))
            config.label2id = {name: number for number, name in config.id2label.items()}
            writer.task(folder, task, config, type(net).__name__, head.tensors())

    def exported(self, folder: Path) -> nn.Module:
        import transformers

        first = sorted((folder / "tasks").iterdir())[0]
        return self._bare(getattr(transformers, self.auto).from_pretrained(first, dtype=torch.float32))

    def answers(self, folder: Path, tasks: Sequence[str]) -> Mapping[str, Callable[[Batch], Tensor]]:
        import transformers

        def of(task: str) -> Callable[[Batch], Tensor]:
            auto = getattr(transformers, self.auto)
            net = auto.from_pretrained(folder / "tasks" / task, dtype=torch.float32).eval()
            return lambda batch: self.features(net.to(next(iter(batch.values())).device), batch)

        return {task: of(task) for task in tasks}


def _tied_output(net: Any) -> nn.Linear | None:
    """The output layer, where its weight is that of the embeddings."""
    try:
        inner, output = net.get_input_embeddings(), net.get_output_embeddings()
    except NotImplementedError:  # a network without tokens
        return None
    weight = getattr(output, "weight", None)
    return output if weight is not None and weight is getattr(inner, "weight", None) else None


def _has_config(source: str) -> bool:
    """Whether a source is more than weights: a hub id, or a folder with a configuration."""
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
