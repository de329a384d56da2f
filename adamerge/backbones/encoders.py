"""Sentence encoders and sequence-to-sequence networks of transformers."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

from adamerge.backbones.text import IDS, MASK, TextInput, trimmed
from adamerge.backbones.transformers import Transformers
from adamerge.checkpoints import State
from adamerge.naming import literal
from adamerge.task_modules import AsIs, TaskModule
from adamerge.types import ROWS, Batch, InputError, TaskInfo


class SentenceEncoder(TextInput, Transformers):
    """Any `AutoModel` as an encoder of sentences: [B, D], pooled over tokens.

    Samples are texts under `text`; with a second one under `positive`, both are encoded, one row after the other. There
    are no heads and no classes: minimise `InfoNCE` or `FeatureDistillation`.

    Args:
        model: Where architecture and tokenizer come from: a folder, or a hub id with or without `@revision`. By default
            the merge's base.
        pooling: `mean` over the tokens, the first token (`cls`), or the `last`.
        normalize: Divide embeddings by their L2 norm.
        max_length: Longer samples are cut to so many tokens; by default what tokenizer and network allow.
        attention: Attention implementation, as transformers names them; by default the fastest it finds.
        remote_code: Run code that the model's folder brings along. Only for models you trust as you would code.
        blocks: Regular expression of the whole names of the network's blocks; by default the parts of its largest
            `nn.ModuleList`.

    Raises:
        InputError: No such model, or no tokenizer.

    Source: mean pooling as in Sentence-BERT, arXiv 1908.10084.
    """

    auto: ClassVar[str] = "AutoModel"
    has_heads = True  # none are needed

    def __init__(
        self,
        model: str | None = None,
        *,
        pooling: Literal["mean", "cls", "last"] = "mean",
        normalize: bool = True,
        max_length: int | None = None,
        attention: str | None = None,
        remote_code: bool = False,
        blocks: str | None = None,
    ) -> None:
        super().__init__(model, attention=attention, remote_code=remote_code, blocks=blocks)
        self._pooling, self._normalize, self._max_length = pooling, normalize, max_length

    def prepare(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        first = super().prepare(sample)
        if IDS in sample or not isinstance(sample.get("positive"), str):
            return first
        second = self.tokens(sample["positive"])
        return {name: torch.stack([first[name], tensor]) for name, tensor in second.items()}  # [2, L]

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        batch = trimmed(default_collate(list(samples)))
        if batch[IDS].dim() == 2:
            return batch
        flat = {name: value.flatten(0, 1) if name in self._taken else value for name, value in batch.items()}
        return {**flat, ROWS: torch.arange(len(flat[IDS]))}

    def concatenate(self, batches: Sequence[Batch]) -> Batch:
        whole = super().concatenate([{k: v for k, v in batch.items() if k != ROWS} for batch in batches])
        return {**whole, ROWS: torch.arange(len(whole[IDS]))} if ROWS in batches[0] else whole

    def features(self, net: nn.Module, batch: Batch) -> Tensor:
        hidden_BLD = net(**self.inputs(batch)).last_hidden_state
        mask_BL = batch[MASK].to(hidden_BLD.dtype)
        if self._pooling == "mean":
            features = (hidden_BLD * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True).clamp(min=1)
        else:
            place_B = mask_BL.argmax(1) if self._pooling == "cls" else (mask_BL * torch.arange(
                mask_BL.shape[1], device=mask_BL.device)).argmax(1)  # fmt: skip
            features = hidden_BLD[torch.arange(len(hidden_BLD), device=hidden_BLD.device), place_B]
        return F.normalize(features, dim=-1) if self._normalize else features

    def head(self, task: TaskInfo) -> TaskModule:
        return AsIs(task)

    def loading(self, task: str) -> str:
        return """from transformers import AutoModel, AutoTokenizer

folder = "{folder}"
model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
batch = tokenizer(["a text", "another"], padding=True, return_tensors="pt")
tokens = model(**batch).last_hidden_state  # pooled as tasks.json says; this is `mean`
mask = batch["attention_mask"][..., None]
print((tokens * mask).sum(1) / mask.sum(1))"""

    def about(self, task: str) -> Mapping[str, Any]:
        return {"pooling": self._pooling, "normalize": self._normalize}


class Seq2Seq(TextInput, Transformers):
    """Any `AutoModelForSeq2SeqLM`, such as T5: the whole network is merged, and answers are told from its vocabulary.

    Samples are texts under `text`, with a second one under `pair` where the template has a place for it. A task with
    classes is answered by its class names: its logits [B, C] are those of the names' first tokens, right after the
    decoder's start token. A sample with a text under `target` is answered token by token, each after the target's
    tokens before it: one row of logits [V] for each. Features are the logits over the whole vocabulary.

    Args:
        model: Where architecture and tokenizer come from: a folder, or a hub id with or without `@revision`. By default
            the merge's base.
        templates: Prompts with `{text}` and, for pairs, `{pair}`, for all tasks or for each.
        max_length: Longer samples are cut to so many tokens; by default what tokenizer and network allow.
        max_target: Longer targets are cut to so many tokens.
        attention: Attention implementation, as transformers names them; by default the fastest it finds.
        remote_code: Run code that the model's folder brings along. Only for models you trust as you would code.
        blocks: Regular expression of the whole names of the network's blocks; by default the parts of its largest
            `nn.ModuleList`.

    Raises:
        InputError: No such model, no tokenizer, a prompt without `{text}`, or class names that begin with one token.

    Source: entropy of the first token's prediction is AdaMerging's for Flan-T5. Deviations: the decoder starts with the
    network's own start token; the softmax is over the classes' tokens, where there are classes.
    """

    auto: ClassVar[str] = "AutoModelForSeq2SeqLM"
    has_heads = True

    def __init__(
        self,
        model: str | None = None,
        *,
        templates: str | Mapping[str, str] = "{text}",
        max_length: int | None = None,
        max_target: int = 32,
        attention: str | None = None,
        remote_code: bool = False,
        blocks: str | None = None,
    ) -> None:
        super().__init__(model, attention=attention, remote_code=remote_code, blocks=blocks)
        self._templates, self._max_length, self._max_target = templates, max_length, max_target
        prompts = list(templates.values()) if isinstance(templates, Mapping) else [templates]
        if max_target < 1:
            raise InputError(f"`backbone.max_target` is {max_target}; it is a number of tokens, at least 1.")
        wrong = [prompt for prompt in prompts if "{text}" not in prompt]
        if wrong:
            raise InputError(f"`backbone.templates` need {{text}} for the sample's text; '{wrong[0]}' has none.")

    def own(self, base: State) -> Mapping[str, str]:
        return {}  # what stands beside the body makes the answers of all tasks

    def preparer(self, task: str) -> Any:
        return partial(self._prepared, template=self._template(task))

    def _template(self, task: str) -> str:
        if isinstance(self._templates, str):
            return self._templates
        if task not in self._templates:
            raise InputError(f"`backbone.templates` has none for task '{task}'; it has {', '.join(self._templates)}.")
        return self._templates[task]

    def prepare(self, sample: Mapping[str, Any]) -> Mapping[str, Any]:
        if not isinstance(self._templates, str):
            raise InputError("`backbone.templates` differ from task to task: say whose samples are prepared.")
        return self._prepared(sample, self._templates)

    def _prepared(self, sample: Mapping[str, Any], template: str) -> Mapping[str, Any]:
        if IDS in sample:
            return sample
        if "{pair}" in template and not isinstance(sample.get("pair"), str):
            raise InputError("The task's template has a place for a `pair`, its samples have none; see `columns`.")
        text = sample.get("text")
        if isinstance(text, str):
            parts = {"{text}": text, "{pair}": str(sample.get("pair"))}
            text = re.sub(r"\{text\}|\{pair\}", lambda found: parts[found[0]], template)
        made = dict(super().prepare({**sample, "text": text, "pair": None}))
        if not isinstance(sample.get("target"), str):
            return made
        target = self.tokenizer(text_target=sample["target"], truncation=True, max_length=self._max_target)[IDS]
        padded = torch.full((self._max_target,), -100, dtype=torch.int32)
        padded[: len(target)] = torch.tensor(target, dtype=torch.int32)
        return {**made, "target": padded, "label": padded}

    def collate(self, samples: Sequence[Mapping[str, Any]]) -> Batch:
        batch = dict(default_collate(list(samples)))
        target = batch.pop("target", None)
        label = batch.pop("label", None)
        batch = trimmed(batch)
        if target is None:
            return batch if label is None else {**batch, "label": label}
        length = max(1, int((target >= 0).sum(-1).max()))
        rows_N = (target[:, :length] >= 0).flatten().nonzero()[:, 0]
        known = {} if label is None else {"label": label[:, :length].flatten()[rows_N].long()}
        return {**batch, "target": target[:, :length].long(), **known, ROWS: rows_N}

    def concatenate(self, batches: Sequence[Batch]) -> Batch:
        if any("target" in batch for batch in batches):
            raise InputError("Batches with targets cannot be concatenated; set `loop.order` to per_task.")
        return super().concatenate(batches)

    def features(self, net: nn.Module, batch: Batch) -> Tensor:
        target_BL = batch.get("target")
        start_B1 = torch.full_like(batch[IDS][:, :1], self._start).long()
        if target_BL is None:
            return net(**self.inputs(batch), decoder_input_ids=start_B1, use_cache=False).logits[:, 0]
        before_BL = torch.cat([start_B1, target_BL[:, :-1]], 1)
        before_BL = before_BL.masked_fill(before_BL < 0, self.tokenizer.pad_token_id)
        logits_BLV = net(**self.inputs(batch), decoder_input_ids=before_BL, use_cache=False).logits
        return logits_BLV.flatten(0, 1)[batch[ROWS]]

    @property
    def _start(self) -> int:
        start = self.config.decoder_start_token_id
        if start is None:
            raise InputError(f"The configuration of '{self.model}' names no `decoder_start_token_id`; add it there.")
        return int(start)

    def head(self, task: TaskInfo) -> TaskModule:
        if not task.classes:
            return AsIs(task, self.config.vocab_size)
        first = [self.tokenizer(name, add_special_tokens=False)[IDS][0] for name in task.classes]
        same = [name for name, token in zip(task.classes, first, strict=True) if first.count(token) > 1]
        if same:
            raise InputError(
                f"Task '{task.name}' has classes that begin with the same token: {', '.join(same[:4])}; they are told "
                "apart by their first. Name them otherwise in `classes`, as the expert answers."
            )
        return Words(task, first)

    def loading(self, task: str) -> str:
        return f"""import json
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

folder = "{{folder}}"
model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
task = json.load(open(folder + "/tasks.json"))[{literal(task, template=True)}]
prompt = task["template"].replace("{{{{text}}}}", "a text").replace("{{{{pair}}}}", "another")
answer = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8)
print(tokenizer.decode(answer[0], skip_special_tokens=True))"""

    def about(self, task: str) -> Mapping[str, Any]:
        return {"template": self._template(task)}


class Words(TaskModule):
    """The logits of the classes' tokens among those of a vocabulary: [B, V] -> [B, C].

    Args:
        task: The task.
        tokens: The number of each class's token.
    """

    tokens: Tensor

    def __init__(self, task: TaskInfo, tokens: Sequence[int]) -> None:
        super().__init__(task)
        self.register_buffer("tokens", torch.tensor(tokens), persistent=False)

    @property
    def num_classes(self) -> int:
        return len(self.tokens)

    def forward(self, features: Tensor) -> Tensor:
        return features[:, self.tokens]
