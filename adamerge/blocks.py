"""The blocks of a network, and what each puts out: tokens [B, N, D], a map [B, D, H, W], or features [B, D]."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adamerge.patterns import Pattern
from adamerge.types import InputError

Hook = Callable[[nn.Module, Any, Any], Any]


def block_names(net: nn.Module, pattern: str | None = None) -> tuple[str, ...]:
    """The modules that a network is a chain of, by name and in order.

    Args:
        net: The network.
        pattern: Regular expression that a block's whole name matches. By default they are the children with parameters
            of the largest `nn.ModuleList`, or where there is none, of the largest `nn.Sequential`.

    Raises:
        InputError: A pattern that is no regular expression or matches no module.
    """
    if pattern is not None:
        blocks = Pattern(pattern, "backbone.blocks")
        names = tuple(name for name, _ in net.named_modules() if blocks.fullmatch(name))
        if not names:
            raise InputError(f"`backbone.blocks` is '{pattern}', which is the name of no module of the network.")
        return names
    for kind in (nn.ModuleList, nn.Sequential):
        lists = [(name, _blocks_in(name, each)) for name, each in net.named_modules() if type(each) is kind]
        lists = [(name, blocks) for name, blocks in lists if len(blocks) > 1]
        if lists:
            return max(lists, key=lambda found: _size(net.get_submodule(found[0])))[1]
    return ()


def _blocks_in(name: str, container: nn.Module) -> tuple[str, ...]:
    prefix = f"{name}." if name else ""
    return tuple(f"{prefix}{child}" for child, module in container.named_children() if _size(module))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def tokens_of(output: Any) -> Tensor:
    """The tensor that a block hands to the next: itself, or the first of what it puts out.

    Raises:
        InputError: It puts out something else.
    """
    first = _first(output)
    if not isinstance(first, Tensor):
        raise InputError(
            f"A block puts out a {type(output).__name__} that is neither a tensor nor begins with one; "
            "name other modules with `backbone.blocks`."
        )
    return first


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) and output else output


def with_tokens(output: Any, tokens: Tensor) -> Any:
    """Return the output of a block with other tokens in it."""
    if isinstance(output, Tensor):
        return tokens
    if hasattr(output, "_fields"):  # a named tuple
        return type(output)(tokens, *output[1:])
    return type(output)((tokens, *output[1:]))


def channel_axis(tokens: Tensor) -> int:
    """Which axis of a block's output holds its D channels: the last, but of a map [B, D, H, W] the second.

    Four axes are taken for [B, H, W, D] where the two in the middle, and they alone, are equal.
    """
    if tokens.dim() != 4:
        return tokens.dim() - 1
    return 3 if tokens.shape[1] == tokens.shape[2] != tokens.shape[3] else 1


def pooled(tokens: Tensor, size: int) -> Tensor:
    """The mean over tokens, [B, D], of what a block puts out for B samples; tokens may stand before samples."""
    channels = channel_axis(tokens)
    samples = 1 if tokens.dim() == 3 and tokens.shape[0] != size and tokens.shape[1] == size else 0
    over = [axis for axis in range(tokens.dim()) if axis not in (samples, channels)]
    return tokens.mean(over) if over else tokens


@contextmanager
def hooked(net: nn.Module, hooks: Mapping[str, Hook], *, first: bool = False) -> Iterator[None]:
    """Forward hooks on modules of the network for the length of the block; compiled code, blind to them, rests.

    Args:
        net: The network.
        hooks: By the module's name: (module, inputs, output) -> another output, or None to leave it.
        first: Before the hooks that stand there already.
    """
    with ExitStack() as stack:
        if hooks:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, hook in hooks.items():
            stack.callback(net.get_submodule(name).register_forward_hook(hook, prepend=first).remove)
        yield


@contextmanager
def recorded_blocks(
    net: nn.Module, names: Sequence[str], size: int, *, learned: bool = False
) -> Iterator[list[Tensor]]:
    """A list that a forward inside the block fills with each named block's mean over tokens, [B, D], in fp32 or more.

    A block that puts out no such tensor is left out of it.

    Args:
        net: The network.
        names: Its blocks, in the order in which they run.
        size: B.
        learned: Refuse blocks without the gradient that is otherwise asked for.

    Raises:
        InputError: In the forward, a block without gradient, if `learned`.
    """
    found: list[Tensor] = []
    learned = learned and torch.is_grad_enabled()

    def record(module: nn.Module, inputs: Any, output: Any) -> None:
        if learned and not torch.is_grad_enabled():
            raise InputError(
                "The network's blocks run without gradient, as in reentrant activation checkpointing, so what they put "
                "out cannot be learned from; checkpoint with `use_reentrant=False`."
            )
        tokens = _first(output)
        if isinstance(tokens, Tensor) and tokens.is_floating_point():
            found.append(pooled(tokens if tokens.dtype.itemsize > 2 else tokens.float(), size))

    with hooked(net, dict.fromkeys(names, record)):
        yield found
