"""Base and task vectors, frozen and out of sight of everything that walks a module's parameters."""

import hashlib
import json
import tempfile
import weakref
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from adamerge.audit import ValueAudit, header_problems
from adamerge.checkpoints import State, open_state
from adamerge.deltas import Deltas, DenseDeltas
from adamerge.files import built_once, cache_dir
from adamerge.modules import FrozenStore
from adamerge.recorded import spec
from adamerge.seeding import seed_of
from adamerge.space import ParamSpace
from adamerge.types import raise_all

Placement = Literal["device", "cpu", "mmap"]


class TauMap(Protocol):
    """What `transformed` needs of a transform; see `adamerge.transforms.Transform`."""

    def prepare(self, vectors: "TaskVectors") -> None: ...
    def __call__(self, name: str, deltas: Deltas, generators: Sequence[torch.Generator]) -> Deltas: ...


class Observer(Protocol):
    """Looks at each tensor that `stored` reads; `finish` may raise, and then nothing is kept."""

    def __call__(self, name: str, base: Tensor, deltas: Deltas) -> None: ...
    def finish(self) -> None: ...


class TaskVectors(FrozenStore):
    """theta_0 and tau_t = theta_t - theta_0 for every merged tensor.

    Made lazily by `open`, changed lazily by `transformed`, brought into memory by `stored`; `load` does the usual
    chain.

    Attributes:
        space: The merged tensors.
        tasks: The T task names, in the order of every task axis.
    """

    def __init__(self, space: ParamSpace, tasks: Sequence[str]) -> None:
        super().__init__()
        self.space, self.tasks = space, tuple(tasks)

    @abstractmethod
    def base(self, name: str) -> Tensor:
        """theta_0 of one tensor, [*S]."""

    @abstractmethod
    def deltas(self, name: str) -> Deltas:
        """The T task vectors of one tensor."""

    @abstractmethod
    def fingerprint(self) -> str | None:
        """Names these vectors: equal for equal files, transforms and seeds; None for tensors that have no file."""

    @staticmethod
    def open(space: ParamSpace, base: Any, experts: Mapping[str, Any]) -> "TaskVectors":
        """Vectors read from the checkpoints whenever asked for; see `open_state` for what a source may be."""
        return _OpenVectors(space, open_state(base), {task: open_state(source) for task, source in experts.items()})

    @staticmethod
    def load(
        space: ParamSpace,
        base: Any,
        experts: Mapping[str, Any],
        *,
        dtype: torch.dtype | None = None,
        placement: Placement = "device",
        ancestry: Literal["error", "warn"] = "error",
    ) -> "TaskVectors":
        """Check the checkpoints against the space, read them once, check the values as they pass.

        Raises:
            InputError: All that is wrong with names, shapes and dtypes, before anything is read; or with the values,
                after.
        """
        base, experts = open_state(base), {task: open_state(source) for task, source in experts.items()}
        raise_all(header_problems(space, base, experts), "the checkpoints")
        audit = ValueAudit(tuple(experts), ancestry)
        return TaskVectors.open(space, base, experts).stored(dtype=dtype, placement=placement, observe=audit)

    def transformed(self, transforms: Sequence[TauMap], *, seed: int = 0) -> "TaskVectors":
        """The vectors seen through transforms, applied in turn, tensor by tensor, whenever asked for.

        Args:
            transforms: Each is prepared on the vectors as its predecessors leave them.
            seed: Randomness is drawn per (seed, place in the list, task, tensor name), so that neither the other tasks
                nor the order of anything changes it.
        """
        vectors = self
        for index, transform in enumerate(transforms):
            vectors = _TransformedVectors(vectors, transform, f"{seed}/{index}")
        return vectors

    def stored(
        self,
        *,
        dtype: torch.dtype | None = None,
        placement: Placement = "device",
        observe: Observer | None = None,
    ) -> "TaskVectors":
        """Read every tensor once and keep it.

        Args:
            dtype: Storage of the task vectors; by default what they come in.
            placement: `device` follows the model, `cpu` stays in memory, `mmap` stays on disk (in the cache folder,
                where equal vectors are found again; vectors without files go to a temporary folder).
            observe: Called with each tensor that is read, and once after the last.
        """
        return _StoredVectors(self, dtype, placement, observe)


class _OpenVectors(TaskVectors):
    def __init__(self, space: ParamSpace, base: State, experts: Mapping[str, State]) -> None:
        super().__init__(space, tuple(experts))
        self._base, self._experts = base, dict(experts)
        self._names = space.checkpoint_names()

    def _read(self, state: State, name: str) -> Tensor:
        return state[next(key for key in self._names[name] if key in state)]

    def base(self, name: str) -> Tensor:
        return self._read(self._base, name)

    def deltas(self, name: str) -> Deltas:
        experts = [self._read(state, name) for state in self._experts.values()]
        base = self.base(name)
        kept = experts[0].dtype
        for tensor in [base, *experts]:
            kept = torch.promote_types(kept, tensor.dtype)
        wide = torch.promote_types(kept, torch.float32)
        stacked = torch.empty(len(experts), *base.shape, dtype=kept)
        for row, expert in zip(stacked, experts, strict=True):
            row.copy_(expert.to(wide) - base.to(wide))
        return DenseDeltas(stacked)

    def fingerprint(self) -> str | None:
        states = [self._base, *self._experts.values()]
        if not all(state.files for state in states):
            return None
        return _digest([state.sha256() for state in states], self.tasks, self.space.shapes)


class _TransformedVectors(TaskVectors):
    def __init__(self, vectors: TaskVectors, transform: TauMap, seed: str) -> None:
        super().__init__(vectors.space, vectors.tasks)
        self._vectors, self._transform, self._seed = vectors, transform, seed
        transform.prepare(vectors)

    def base(self, name: str) -> Tensor:
        return self._vectors.base(name)

    def deltas(self, name: str) -> Deltas:
        generators = [torch.Generator().manual_seed(seed_of(self._seed, task, name)) for task in self.tasks]
        return self._transform(name, self._vectors.deltas(name), generators)

    def fingerprint(self) -> str | None:
        before = self._vectors.fingerprint()
        return before and _digest(before, spec(self._transform), self._seed)

    def _move(self, device: torch.device) -> None:
        self._vectors._move(device)


class _StoredVectors(TaskVectors):
    def __init__(
        self,
        vectors: TaskVectors,
        dtype: torch.dtype | None,
        placement: Placement,
        observe: Observer | None,
    ) -> None:
        super().__init__(vectors.space, vectors.tasks)
        self._placement, self._fingerprint = placement, vectors.fingerprint()
        self._bases: dict[str, Tensor] = {}
        self._deltas: dict[str, DenseDeltas] = {}

        def read(name: str) -> DenseDeltas:
            base, deltas = vectors.base(name), vectors.deltas(name)
            if observe is not None:
                observe(name, base, deltas)
            self._bases[name] = base.clone()  # the file may be memory-mapped, and change or go
            return (
                deltas if isinstance(deltas, DenseDeltas) and dtype is None else DenseDeltas(deltas.dense().to(dtype))
            )

        if placement == "mmap":
            # only vectors as they come are kept for other runs: a transform's code may change under the same name
            key = _digest(self._fingerprint, str(dtype)) if isinstance(vectors, _OpenVectors) else None
            self._map(read, observe, vectors.base, key if self._fingerprint else None)
        else:
            self._deltas = {name: read(name) for name in self.space.shapes}
            if observe is not None:
                observe.finish()

    def _map(
        self,
        read: Callable[[str], DenseDeltas],
        observe: Observer | None,
        base: Callable[[str], Tensor],
        key: str | None,
    ) -> None:
        """One safetensors file per tensor, so that writing never holds more than one tensor's vectors."""

        def build(folder: Path) -> None:
            for index, name in enumerate(self.space.shapes):
                save_file({"delta": read(name).stacked.contiguous()}, folder / f"{index:05d}.safetensors")
            if observe is not None:
                observe.finish()

        if key is None:
            folder = Path(tempfile.mkdtemp(prefix="adamerge-vectors-"))
            weakref.finalize(self, rmtree, folder, ignore_errors=True)
            build(folder)
        else:
            folder = built_once(cache_dir() / "vectors" / key, build)
        for index, name in enumerate(self.space.shapes):
            if name not in self._bases:  # the folder was there, built and audited before
                self._bases[name] = base(name).clone()
            with safe_open(folder / f"{index:05d}.safetensors", framework="pt") as file:
                self._deltas[name] = DenseDeltas(file.get_tensor("delta"))

    def base(self, name: str) -> Tensor:
        return self._bases[name]

    def deltas(self, name: str) -> Deltas:
        return self._deltas[name]

    def fingerprint(self) -> str | None:
        return self._fingerprint

    def _move(self, device: torch.device) -> None:
        if self._placement != "device":
            return
        self._bases = {name: base.to(device) for name, base in self._bases.items()}
        for deltas in self._deltas.values():
            deltas.stacked = deltas.stacked.to(device)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
