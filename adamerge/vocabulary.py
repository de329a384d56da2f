"""Tokens of base and experts: the same ones, or what was asked for where they are not."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from torch import nn

from adamerge.checkpoints import Overlaid, State
from adamerge.space import ParamSpace
from adamerge.types import some

if TYPE_CHECKING:
    from adamerge.recipe import Recipe

_ADVICE = (
    "Set `model.space.vocabulary` to `base` to keep the base's token embeddings unmerged, or to `exclude` to leave this "
    "expert out of their merge; its own tokens are unknown to the merge either way."
)


def fit_vocabularies(
    recipe: "Recipe", net: nn.Module, space: ParamSpace, base: State, experts: Mapping[str, State]
) -> tuple[ParamSpace, dict[str, State], list[str]]:
    """The space and experts after the policy `model.space.vocabulary`, and what it refuses; nothing is cut to size."""
    names = [name for name in recipe.backbone.token_tensors(net) if name in space.shapes]
    faults = {task: list(_faults(recipe, task, names, space, state)) for task, state in experts.items()}
    faults = {task: said for task, said in faults.items() if said}
    if recipe.space.vocabulary == "error":
        said = {task: "; ".join(each) for task, each in faults.items()}
        told = [f"Expert '{t}' has another vocabulary than the base: {each}. {_ADVICE}" for t, each in said.items()]
        return (space.apart(dict.fromkeys(names, "vocabularies differ")) if told else space), {**experts}, told
    if recipe.space.vocabulary == "base" and faults:
        space = space.apart(dict.fromkeys(names, "vocabularies differ: the base's"))
        return space, {**experts}, []
    same = {alias: name for name in names for alias in space.names_of(name)}
    fitted = {
        task: Overlaid(state, {alias: base for alias in same if alias in base}) if task in faults else state
        for task, state in experts.items()
    }
    return space, fitted, []


def _faults(recipe: "Recipe", task: str, names: list[str], space: ParamSpace, state: State) -> Iterator[str]:
    ours, theirs = (recipe.backbone.vocabulary(source) for source in (recipe.base, recipe.experts[task]))
    if names and ours is not None and theirs is not None and ours != theirs:
        more, fewer = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
        moved = sorted(token for token in set(ours) & set(theirs) if ours[token] != theirs[token])
        said = {"it has more tokens": more, "it lacks tokens": fewer, "tokens have other numbers": moved}
        yield from (f"{what}: {some(tokens)}" for what, tokens in said.items() if tokens)
    for name in names:
        key = next((key for key in space.names_of(name) if key in state), None)
        if key is not None and state.meta(key)[0] != space.shapes[name]:
            yield f"{key} is {list(state.meta(key)[0])}, the network's {list(space.shapes[name])}"
