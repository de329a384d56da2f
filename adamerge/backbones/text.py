"""Texts as tokens: prepared to a fixed length, cut to the longest of a batch."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from adamerge.backbones.base import batch_size
from adamerge.backbones.explained import explained
from adamerge.backbones.folder import TOKENIZER
from adamerge.checkpoints import locate
from adamerge.files import sha256
from adamerge.types import ROWS, UNLABELED, Batch, InputError
from adamerge.vocabulary import Vocabulary

if TYPE_CHECKING:
    from adamerge.backbones.transformers import Transformers

    _Base = Transformers
else:
    _Base = object

IDS, MASK = "input_ids", "attention_mask"
_UNBOUNDED = 10**6  # tokenizers without a limit say 1e30
_LONGEST = 512  # what is taken then


class TextInput(_Base):
    """The part of a backbone that takes texts; stands before `Transformers` among the bases."""

    _max_length: int | None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own.

        Raises:
            InputError: There is none.
        """
        if not self._tokenizer_files(self.model):  # the library would make one up, without words
            raise InputError(
                f"'{self.model}' has no tokenizer; put the files of its own there (`tokenizer.save_pretrained`), or "
                "name a folder or hub id in `backbone.model` that has them."
            )
        with explained(f"The tokenizer of '{self.model}' cannot be had", self._code_of(self.model)):
            made = self._tokenizer(self.model)
        if made.pad_token_id is None:
            made.pad_token = made.eos_token or made.unk_token
        if made.pad_token_id is None:
            raise InputError(f"The tokenizer of '{self.model}' has no token to pad with; give it a `pad_token`.")
        return made

    def _tokenizer_files(self, source: str) -> list[Path]:
        """The files that a tokenizer is made of; none where there are settings alone."""
        folder = locate(source, weights=False)
        files = sorted({file for pattern in TOKENIZER for file in folder.glob(pattern)}) if folder.is_dir() else []
        return [] if all(file.name.endswith(("_config.json", "_map.json")) for file in files) else files

    def _tokenizer(self, source: str) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(locate(source, weights=False), trust_remote_code=self._remote)

    @cached_property
    def length(self) -> int:
        """The most tokens of a sample: as asked for, or as many as tokenizer and network allow."""
        limits = [self.tokenizer.model_max_length, self._positions]
        bounded = [limit for limit in limits if limit is not None and 0 < limit < _UNBOUNDED]
        most = min(bounded, default=_LONGEST)
        if self._max_length is not None and self._max_length < 4:
            raise InputError(f"`backbone.max_length` is {self._max_length}; it is a number of tokens, at least 4.")
        if self._max_length is not None and bounded and self._max_length > most:
            raise InputError(
                f"`backbone.max_length` is {self._max_length}; '{self.model}' takes {most} tokens at most."
            )
        return self._max_length or most

    @cached_property
    def _positions(self) -> int | None:
        """Return the number of positions that the network has for tokens; RoBERTa's first ones are for none."""
        known = getattr(self.config, "max_position_embeddings", None)
        with torch.device("meta"):
            tables = [each for each in self._make(self._config()).modules() if isinstance(each, nn.Embedding)]
        shifts = [t.padding_idx + 1 for t in tables if t.num_embeddings == known and t.padding_idx is not None]
        return known and known - max(shifts, default=0)

    def _config(self) -> Any:
        config = super()._config()
        if config.pad_token_id is None:  # decoders look for the last token that is no padding
            config.pad_token_id = self.tokenizer.pad_token_id
        return config

    @property
    def tokens_per_sample(self) -> int | None:
        return self.length

    def vocabulary(self, source: str) -> Vocabulary | None:
        files = self._tokenizer_files(source)
        if not files:
            return None
        digest = "".join(file.name + sha256(file) for file in files)
        if digest not in self._vocabularies:  # as a rule all experts have the base's
            with explained(f"The tokenizer of '{source}' cannot be had", self._code_of(source)):
                made = self._tokenizer(source)
            special = {role: str(token) for role, token in made.special_tokens_map.items() if isinstance(token, str)}
            template = str(made.chat_template) if made.chat_template else None
            self._vocabularies[digest] = Vocabulary(made.get_vocab(), special, template)
        return self._vocabularies[digest]

    @cached_property
    def _vocabularies(self) -> dict[str, Vocabulary]:
        return {}

    def token_tensors(self, net: nn.Module) -> Sequence[str]:
        found = [get() for name in ("get_input_embeddings", "get_output_embeddings") if (get := _method(net, name))]
        own = {id(p) for module in found if module is not None for p in module.parameters(recurse=False)}
        return [name for name, parameter in net.named_parameters() if id(parameter) in own]

    # --- samples

    def prepare(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        if IDS in sample:
            return sample
        if not isinstance(sample.get("text"), str):
            kind = f"as `text` a {type(sample['text']).__name__}" if "text" in sample else "no text"
            raise InputError(
                f"A sample has {kind}; it holds {', '.join(sorted(sample))}. Say in `columns` of the data which column "
                "is the `text`."
            )
        return {**self.tokens(sample["text"], sample.get("pair")), **_kept(sample)}

    def tokens(self, text: Any, pair: Any = None, *, words: bool = False) -> dict[str, Tensor]:
        """One text, or two that the tokenizer joins, padded to `length`."""
        made = self.tokenizer(
            text, pair, truncation=True, max_length=self.length, padding="max_length", is_split_into_words=words
        )
        return {name: torch.tensor(made[name], dtype=torch.int32) for name in made if name in self._taken}

    @cached_property
    def _taken(self) -> set[str]:
        """Return the names that the tokenizer gives and the network takes."""
        with torch.device("meta"):
            known = inspect.signature(self._make(self._config()).forward).parameters
        return {IDS, MASK} | {name for name in self.tokenizer.model_input_names if name in known}

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        return trimmed(default_collate(list(samples)))

    def concatenate(self, batches: Sequence[Batch]) -> Batch:
        return joined(batches, {IDS: self.tokenizer.pad_token_id})

    def inputs(self, batch: Batch) -> Mapping[str, Tensor]:
        if IDS not in batch:
            raise InputError(f"A batch holds {', '.join(sorted(batch))}, no `{IDS}`: its samples were not prepared.")
        return {name: value.long() for name, value in batch.items() if name in self._taken}

    def example(self, net: nn.Module, number: int) -> Batch:
        generator = torch.Generator().manual_seed(0)
        size = min(len(self.tokenizer), self.config.vocab_size)
        ids_BL = torch.randint(size, (number, max(1, min(16, self.length) - 4)), generator=generator).tolist()
        lengths = torch.randint(1, len(ids_BL[0]) + 1, (number,), generator=generator).tolist()
        texts = [
            self.tokenizer.decode(ids[:n], skip_special_tokens=True) for ids, n in zip(ids_BL, lengths, strict=True)
        ]
        return self.collate([TextInput.prepare(self, {"text": text}) for text in texts])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("layout", "_vocabularies")}


def _method(net: nn.Module, name: str) -> Callable[[], Any] | None:
    return getattr(net, name, None)


def _kept(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {"label": sample["label"]} if "label" in sample else {}


def trimmed(batch: dict[str, Any]) -> dict[str, Any]:
    """Without the places that are padding in all samples."""
    used = batch[MASK].bool()
    place = used.reshape(-1, used.shape[-1]).any(0).nonzero()
    first, last = (int(place[0]), int(place[-1]) + 1) if len(place) else (0, 1)
    width = used.shape[-1]
    return {
        name: value[..., first:last] if isinstance(value, Tensor) and value.shape[-1:] == (width,) and value.dim() > 1
        else value
        for name, value in batch.items()
    }  # fmt: skip


def rows_of(batch: dict[str, Any], answers_BL: Tensor) -> dict[str, Any]:
    """The batch with the places of its answers, and their labels alone."""
    rows_N = answers_BL.flatten().nonzero()[:, 0]
    label = {"label": batch["label"].flatten()[rows_N].long()} if "label" in batch else {}
    return {**batch, **label, ROWS: rows_N}


def joined(batches: Sequence[Batch], padding: Mapping[str, int]) -> Batch:
    """Batches of texts as one, padded to the longest. Labels and what experts say are left out."""
    names = [n for n, v in batches[0].items() if n not in ("label", ROWS) and isinstance(v, Tensor) and "." not in n]
    length = max(batch[IDS].shape[-1] for batch in batches)
    whole: dict[str, Any] = {
        name: torch.cat([
            nn.functional.pad(b[name], (0, length - b[IDS].shape[-1] if b[name].shape[-1:] == b[IDS].shape[-1:] else 0),
                              value=padding.get(name, 0))
            for b in batches
        ])
        for name in names
    }  # fmt: skip
    if ROWS in batches[0]:
        starts = [0]
        for batch in batches:
            starts.append(starts[-1] + batch_size(batch))
        rows = []
        for batch, start in zip(batches, starts, strict=False):
            width = batch[IDS].shape[-1]
            rows.append((batch[ROWS] // width + start) * length + batch[ROWS] % width)
        whole[ROWS] = torch.cat(rows)
    return whole


__all__ = ["UNLABELED", "TextInput", "joined", "rows_of", "trimmed"]
