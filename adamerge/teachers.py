"""What the experts say of the samples, and what a merge that is not trained does: computed once, kept on disk."""

import logging
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from adamerge.backbones.base import batch_size, to_device
from adamerge.blocks import recorded_blocks
from adamerge.data import UnlabeledTasks, is_known, samples_key
from adamerge.files import built_once, cache_dir
from adamerge.learnables import state_of
from adamerge.merged import MergedModel
from adamerge.modules import parameter_sites, swapped
from adamerge.opened import Opened
from adamerge.recorded import digest_of, digest_of_tensor, spec
from adamerge.terminal import progress_console
from adamerge.types import KEPT, ROWS, Batch, InputError

log = logging.getLogger("adamerge")

LOGITS, FEATURES, BLOCKS = "expert.logits", "expert.features", "expert.blocks"
EXPERT = frozenset({LOGITS, FEATURES, BLOCKS})
Known = dict[str, Any]  # by an entry's name a tensor [N, …], or a list of them with one for each block


class Teachers:
    """The experts, each run in the merge's own network: the values of its checkpoint, whatever transforms the vectors.

    Args:
        opened: The sources.
        model: Lends its network, outside of its steps.

    Attributes:
        heads: Per task the head as it was before any training.
        blocks: The names of the network's blocks.
        keys: For each task of whose samples something was kept, what that depends on, as one digest.
    """

    def __init__(self, opened: Opened, model: MergedModel) -> None:
        self.opened, self.model = opened, model
        self.heads = {task: deepcopy(model.chain(task)[-1]).requires_grad_(False) for task in model.tasks}
        self.blocks: Sequence[str] = tuple(opened.blocks)
        self.keys: dict[str, str] = {}

    @contextmanager
    def expert(self, task: str) -> Iterator[None]:
        """An expert's weights and buffers in the network for the length of the block, those that are not merged too."""
        model, space, state = self.model, self.opened.space, self.opened.experts[task]
        sites = parameter_sites(model.network)  # of what is not merged; the others' places are empty
        keys = {name: next((k for k in space.names_of(name) if k in state), None) for name in (*space.shapes, *sites)}
        merged = {name: model.fitted(name, state[str(keys[name])]) for name in space.shapes}
        rest = {
            name: state[key].to(getattr(*places[0]))
            for name, places in sites.items()
            if (key := keys[name]) is not None
        }
        with self.opened.buffers_of(task), swapped(sites, rest), model.placed(merged):
            yield

    @torch.no_grad()
    def outputs(self, task: str, batch: Batch, wanted: Collection[str]) -> Known:
        """What the expert says of a batch, in fp32 or more; inside of `expert`."""
        model = self.model
        with recorded_blocks(model.network, self.blocks if BLOCKS in wanted else (), batch_size(batch)) as blocks:
            features_BD = model.backbone.features(model.network, batch)
        features_BD = features_BD.to(torch.promote_types(features_BD.dtype, torch.float32))
        head = self.heads[task].to(features_BD.device)
        known: Known = {FEATURES: features_BD, LOGITS: head(features_BD).to(features_BD.dtype), BLOCKS: list(blocks)}
        return {name: value for name, value in known.items() if name in wanted}

    def complete(self, batches: Mapping[str, Batch], wanted: Collection[str]) -> Mapping[str, Batch]:
        """The batches with what is wanted of the experts, computed where it was not kept."""
        done = {}
        for task, batch in batches.items():
            lacking = set(wanted) - set(batch)
            if lacking:
                with self.expert(task):
                    batch = {**batch, **self.outputs(task, batch, lacking)}
            done[task] = batch
        return done

    def check(self, before: Mapping[str, str]) -> None:
        """Compare with what a training checkpoint was made with.

        Raises:
            InputError: Something was kept then of other samples, or of an expert that was another.
        """
        changed = [task for task, key in self.keys.items() if before.get(task, key) != key]
        if changed:
            raise InputError(
                "`ckpt_path` was trained on what the experts said of other samples: the data, the expert or the "
                f"preprocessing of {', '.join(changed)} has changed since. Put the old ones back, or start afresh "
                "without `--ckpt_path`."
            )


class Keeper:
    """Runs samples through a network once and keeps what comes out, memory-mapped, in the cache folder.

    One process of a machine writes, under a lock; the others read. What depends on files alone is found again by other
    runs; the rest goes when the run ends.

    Args:
        data: Whose training split is run through.
        device: Where the model is.
        token: Names this run, equal on all its ranks.
        precision: The name of the one computed in.
        context: The precision to compute in.
        convert: Brings a batch into it.

    Attributes:
        draws: How many samples of each task the coming phase takes; where there are more, none is taken twice, and
            nothing new is kept.
    """

    def __init__(
        self,
        data: UnlabeledTasks,
        device: torch.device,
        token: str,
        precision: str = "32",
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
        convert: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        self._data, self._device, self._token, self._precision = data, device, token, precision
        self._context, self._convert = context, convert
        self.draws = float("inf")
        self._own: list[Path] = []
        self._taken: dict[str, int] = {}  # bytes by key

    def experts(self, teachers: Teachers, wanted: Collection[str]) -> dict[str, Known]:
        """What the experts say of all samples of the tasks whose data can be kept."""
        model, opened = teachers.model, teachers.opened
        found: dict[str, Known] = {}
        for task in self._repeatable():
            sources = [state.sha256() for state in (opened.experts[task], opened.base)]  # it has what the expert lacks
            network = [spec(model.backbone, strict=False), model.backbone.made_of()]
            key = digest_of(
                self._data_key(task), sources, network, sorted(wanted),
                [(n, digest_of_tensor(t)) for n, t in teachers.heads[task].state_dict().items()], list(teachers.blocks),
                opened.space.skip, self._precision,
            )  # fmt: skip
            logits = teachers.heads[task].num_classes or len(opened.classes[task])
            widths = {FEATURES: opened.width, LOGITS: logits, BLOCKS: sum(opened.blocks.values())}
            if not self._worth("experts", task, key):
                continue
            if not self._fits({key: 4 * len(self._samples(task)) * sum(widths[name] for name in wanted)}):
                log.info(
                    "What experts say does not fit into `data.cache_limit` from %s on: computed at every step.", task
                )
                break
            if self._lasts(task):
                teachers.keys[task] = key
            found[task] = self._kept(
                "experts",
                task,
                key,
                partial(teachers.outputs, task, wanted=wanted),
                teachers.expert(task),
            )
        return found

    def merged(self, teachers: Teachers) -> dict[str, Known]:
        """The merged features of all samples, with the model as it stands; nothing if some cannot be kept."""
        model, tasks, width = teachers.model, self._repeatable(), teachers.opened.width
        learned = {n: digest_of_tensor(tensor) for n, tensor in state_of(model).items() if n.startswith("rule.")}
        rule = [spec(model.rule, strict=False), learned]
        keys = {task: digest_of(self._token, self._data_key(task), rule) for task in tasks}
        if len(tasks) < len(self._data.tasks):
            return {}
        if not all(self._worth("merged", task, key) for task, key in keys.items()):
            return {}
        if not self._fits({keys[task]: 4 * len(self._samples(task)) * width for task in tasks}):
            log.info("Merged features do not fit into `data.cache_limit`: computed at every step.")
            return {}
        return {
            task: self._kept(
                "merged", task, key, lambda batch: {KEPT: model.features(batch).float()}, model.applied(), lasting=False
            )
            for task, key in keys.items()
        }

    def close(self) -> None:
        """Remove what no other run can find."""
        for folder in self._own:
            rmtree(folder, ignore_errors=True)
            Path(f"{folder}.lock").unlink(missing_ok=True)

    def _worth(self, kind: str, task: str, key: str) -> bool:
        """Some sample is taken twice, or was run through before."""
        return self.draws > len(self._samples(task)) or (cache_dir() / kind / key).exists()

    def _fits(self, sizes: Mapping[str, int]) -> bool:
        """Take room for so many bytes under these keys, if there is as much left in the whole run."""
        taken = {**self._taken, **sizes}
        if sum(taken.values()) > 1e9 * self._data.cache_limit:
            return False
        self._taken = taken
        return True

    def _repeatable(self) -> list[str]:
        """The tasks whose samples are the same each time, and answered once each: a table has a row for a sample."""
        same = [task for task, data in self._data.tasks.items() if data.repeatable]
        return [task for task in same if ROWS not in self._data.collate([self._samples(task)[0]])]

    def _lasts(self, task: str) -> bool:
        """Other runs know these samples again."""
        return is_known(self._samples(task))

    def _samples(self, task: str) -> Any:
        return self._data.datasets(self._data.split)[task]

    def _data_key(self, task: str) -> list[Any]:
        """What the prepared samples depend on."""
        return samples_key(self._samples(task), unknown=[self._token, task])

    def _kept(
        self,
        kind: str,
        task: str,
        key: str,
        compute: Callable[[Batch], Known],
        around: AbstractContextManager[Any],
        *,
        lasting: bool = True,
    ) -> Known:
        samples = self._samples(task)

        @torch.no_grad()
        def build(folder: Path) -> None:
            parts: dict[str, list[Tensor]] = {}
            loader = DataLoader(
                samples,
                batch_size=self._data.eval_batch_size,
                num_workers=self._data.num_workers,
                collate_fn=self._data.collate,
            )
            said = f"What its expert says, {task}" if kind == "experts" else f"Merged features, {task}"
            with self._context(), around:
                for batch in track(
                    loader, said, console=progress_console(quiet=not sys.stderr.isatty()), transient=True
                ):
                    inputs = {name: value for name, value in batch.items() if name != "label"}
                    for name, value in compute(self._convert(to_device(inputs, self._device))).items():
                        pieces = (
                            {f"{name}.{place}": v for place, v in enumerate(value)}
                            if isinstance(value, list)
                            else {name: value}
                        )
                        for piece, tensor in pieces.items():
                            parts.setdefault(piece, []).append(tensor.float().cpu())
            save_file({name: torch.cat(tensors) for name, tensors in parts.items()}, folder / "kept.safetensors")

        folder = cache_dir() / kind / key
        if not (lasting and self._lasts(task)):
            self._own.append(folder)
        built_once(folder, build)
        try:
            tables = _read(folder)
        except SafetensorError:  # as long as before, and damaged
            rmtree(folder, ignore_errors=True)
            tables = _read(built_once(folder, build))
        blocks = [tables.pop(f"{BLOCKS}.{place}") for place in range(sum(n.startswith(BLOCKS) for n in tables))]
        return {**tables, **({BLOCKS: blocks} if blocks else {})}


def _read(folder: Path) -> dict[str, Any]:
    with safe_open(folder / "kept.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


__all__ = ["BLOCKS", "EXPERT", "FEATURES", "LOGITS", "Keeper", "Teachers"]
