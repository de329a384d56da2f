"""Where a checkpoint of transformers holds a network's tensors: names, prefixes, the layer that labels decide."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from adamerge.checkpoints import Selected, State
from adamerge.types import InputError, some

log = logging.getLogger("adamerge")

_LEGACY = {"gamma": "weight", "beta": "bias"}  # of layer norms in checkpoints from before 2019
_WITNESSES = 8  # tensors whose names are looked for to find a prefix


@dataclass(frozen=True)
class Layout:
    """The names of a network's tensors, in memory and in checkpoint files.

    Attributes:
        body: The prefix of the shared part, with its dot; empty where the network has no other part.
        names: Parameters and lasting buffers, in the network's order, tied ones under all of their names.
        stored: The name of each in the files that its library writes.
        output: The prefix of the layer whose shape the labels decide, with its dot; empty without one.
        ignored: Names that old checkpoints hold and the network makes by itself.
    """

    body: str
    names: tuple[str, ...]
    stored: Mapping[str, str]
    output: str = ""
    ignored: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, net: Any, body: nn.Module | None = None, output: str = "") -> "Layout":
        """The layout of a network of transformers, which may be on the meta device.

        Args:
            net: The network.
            body: The part of it that tasks share; by default its `base_model`.
            output: The prefix of the output layer.
        """
        state = net.state_dict()
        body = net.base_model if body is None else body
        prefix = next(name for name, module in net.named_modules() if module is body)
        ignored = frozenset(name for name, _ in net.named_buffers() if name not in state)
        stored = _stored_names(net, state)
        return cls(f"{prefix}." if prefix else "", tuple(state), stored, output, ignored)

    def part(self, names: Collection[str], body: str) -> "Layout":
        """The layout of a part of the network, whose shared part stands under a prefix of its own."""
        return replace(self, body=body, names=tuple(name for name in self.names if name in names))

    @property
    def shared(self) -> list[str]:
        """The names of the shared part."""
        return [name for name in self.names if name.startswith(self.body) and not self._is_output(name)]

    @property
    def own(self) -> list[str]:
        """The names that each task has of its own, the output layer last."""
        rest = [name for name in self.names if not name.startswith(self.body) or self._is_output(name)]
        return sorted(rest, key=self._is_output)

    def _is_output(self, name: str) -> bool:
        return bool(self.output) and name.startswith(self.output)

    def select(self, state: State, *, say: bool = True) -> State:
        """A checkpoint's tensors under the network's names.

        The shared part may stand under any one prefix. Other parts than the network's are left where they are; tensors
        of its parts that it does not have stay, for the audit to find.

        Args:
            state: The checkpoint.
            say: What is done with names.

        Raises:
            InputError: The checkpoint holds the network more than once.
        """
        keys = {_modern(key, self.names): key for key in state}
        prefix, renamed = self._found(keys, state.source)
        parts = {name.removeprefix(self.body).partition(".")[0] for name in (*self.shared, *renamed)}
        own, chosen = self.own, dict[str, str]()
        for key, held in keys.items():
            rest = key.removeprefix(prefix)
            if not key.startswith(prefix) or rest.partition(".")[0] not in parts:
                continue
            name = renamed.get(rest, self.body + rest)
            if name not in self.ignored and name not in own:
                chosen[name] = held
        outer = prefix.rstrip(".").rpartition(".")[0]
        outer = f"{outer}." if outer else ""
        for name in own:
            found = next((key for key in (outer + self.stored[name], outer + name, name) if key in keys), None)
            if found is not None:
                chosen[name] = keys[found]
        used = set(chosen.values())
        left = [key for key in state if key not in used]
        if say and prefix not in (self.body, self._stored_body):
            log.info("%s holds the network's tensors under '%s', not '%s'.", state.source, prefix, self.body)
        if say and left:
            log.info("What %s holds beside the network is not merged: %s.", state.source, some(left))
        return Selected(state, chosen, state.source, files=state.files)

    def pooler_not_in(self, state: State) -> list[str]:
        """The names of the shared part's pooler, if a checkpoint has no tensor of it at all.

        Pre-training may have had no use for it; anything else that is missing is a fault of the checkpoint.
        """
        names = [name for name in self.shared if name.removeprefix(self.body).startswith("pooler.")]
        return [] if any(name in state for name in names) else names

    @property
    def _stored_body(self) -> str:
        return self.body if all(self.stored[name].startswith(self.body) for name in self.shared) else ""

    def _found(self, keys: Iterable[str], source: str) -> tuple[str, dict[str, str]]:
        """The shared part's prefix in a checkpoint, and from what follows it to the network's names."""
        keys = list(keys)
        best: tuple[int, str, dict[str, str]] = (0, "", {})
        for rename in (self.stored.__getitem__, lambda name: name):  # as files are written, or as it is in memory
            relative = {rename(name).removeprefix(self.body): name for name in self.shared}
            counts = _prefixes(keys, relative)
            most = max(counts.values(), default=0)
            if most > best[0]:
                winners = sorted(prefix for prefix, count in counts.items() if count == most)
                if len(winners) > 1:
                    raise InputError(
                        f"{source} holds the network {len(winners)} times, under "
                        f"{' and '.join(map(repr, winners[:3]))}; save the one to merge as a checkpoint of its own."
                    )
                best = (most, winners[0], relative)
        return best[1:] if best[0] else (self.body, {})


def _prefixes(keys: list[str], relative: Mapping[str, str]) -> Counter[str]:
    """How many of the names stand in the keys behind each prefix that comes into question."""
    witnesses = sorted(relative, key=len, reverse=True)[:_WITNESSES]
    prefixes = {key[: -len(name)] for name in witnesses for key in keys if key.endswith(name)}
    known = set(keys)
    return Counter({p: sum(p + name in known for name in relative) for p in prefixes if not p or p.endswith(".")})


def _modern(key: str, names: Iterable[str]) -> str:
    stem, _, last = key.rpartition(".")
    return f"{stem}.{_LEGACY[last]}" if last in _LEGACY and key not in names else key


def _stored_names(net: Any, state: Mapping[str, Any]) -> dict[str, str]:
    """From names in memory to names in files, which transformers 5 tells apart for some architectures."""
    same = {name: name for name in state}
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4
        return same
    reverted: Callable[..., Mapping[str, Any]] = revert_weight_conversion
    written = {id(tensor): name for name, tensor in reverted(net, dict(state)).items()}
    return {name: written.get(id(tensor), name) for name, tensor in state.items()}


def output_layer(make: Callable[[int], nn.Module], what: str) -> str:
    """The name of the linear layer whose shape the number of labels decides.

    Args:
        make: Makes the network for so many labels; on the meta device will do.
        what: What the network is called in errors.

    Raises:
        InputError: None, several, or another kind of layer.
    """
    few, more = ({name: p.shape for name, p in make(number).named_parameters()} for number in (3, 5))
    layers = sorted({name.rpartition(".")[0] for name in few if few[name] != more.get(name)})
    net = make(3)
    if len(layers) != 1 or not isinstance(net.get_submodule(layers[0]), nn.Linear):
        raise InputError(
            f"{what} has {len(layers)} layers that the number of labels decides ({some(layers)}); what is merged here "
            "has one, a linear one."
        )
    return layers[0]
