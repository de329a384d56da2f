"""Tokens of base and experts: the same ones, or what was asked for where they are not."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adamerge.checkpoints import Overlaid, State
from adamerge.space import ParamSpace
from adamerge.types import InputError, some

if TYPE_CHECKING:
    from adamerge.recipe import Recipe

_ADVICE = (
    "Set `model.space.vocabulary` to `base` to keep the base's token embeddings unmerged, or to `exclude` to leave "
    "this expert out of their merge; tokens that the base lacks are unknown to the merge either way."
)


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer makes of a text.

    Attributes:
        numbers: The number of each token.
        special: The token of each role, such as `pad_token`.
        template: How a conversation becomes a text, if it does.
    """

    numbers: Mapping[str, int]
    special: Mapping[str, str] = field(default_factory=dict)
    template: str | None = None


@dataclass
class Fitted:
    """Sources after the policy `model.space.vocabulary`.

    Attributes:
        space: What is merged.
        experts: The checkpoints, whose token embeddings stand in the base's numbering.
        excluded: For each expert that is left out of the merge of some tensors, their names in its checkpoint and in
            the base's.
        problems: What the policy refuses.
    """

    space: ParamSpace
    experts: dict[str, State]
    excluded: dict[str, dict[str, str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def fit_vocabularies(
    recipe: "Recipe", net: nn.Module, space: ParamSpace, base: State, experts: Mapping[str, State]
) -> Fitted:
    """Nothing is cut to size: an expert's rows are found by their tokens, and what the base lacks is not looked up."""
    names = [name for name in recipe.backbone.token_tensors(net) if name in space.shapes]
    ours = recipe.backbone.vocabulary(recipe.base) if names else None
    fitted = Fitted(space, {**experts})
    differ: dict[str, dict[str, str]] = {}
    for task, state in experts.items() if names else ():
        try:
            theirs = recipe.backbone.vocabulary(recipe.experts[task])
        except InputError as error:
            fitted.problems.append(str(error))
            continue
        keys = _keys(names, space, base, state)
        rows = [*_other_tokens(ours, theirs), *_other_sizes(keys, base, state)]
        said = [*rows, *_other_uses(ours, theirs)]
        if said and recipe.space.vocabulary == "error":
            what = "; ".join(said)
            fitted.problems.append(f"Expert '{task}' has another vocabulary than the base: {what}. {_ADVICE}")
        if rows:
            places = {key: (other, _rows(ours, theirs, base.meta(other)[0][0], state.meta(key)[0][0]))
                      for key, other in keys.items()}  # fmt: skip
            fitted.experts[task], differ[task] = Overlaid(state, base, places), keys
    if differ and recipe.space.vocabulary == "base":
        fitted.space = space.apart(dict.fromkeys(names, "vocabularies differ: the base's"))
    elif recipe.space.vocabulary == "exclude":
        fitted.excluded = differ
    return fitted


def without(state: State, base: State, names: Mapping[str, str]) -> State:
    """A checkpoint with the base's values in place of its own; `names` are those in the checkpoint, to the base's."""
    if not names:
        return state
    none = {key: torch.full((base.meta(other)[0][0],), -1) for key, other in names.items()}
    return Overlaid(state, base, {key: (names[key], rows_V) for key, rows_V in none.items()})


def _keys(names: list[str], space: ParamSpace, base: State, state: State) -> dict[str, str]:
    """For each name of a token tensor in the expert's checkpoint one in the base's, if but their rows may differ."""
    found = {}
    for name in names:
        other = next((key for key in space.names_of(name) if key in base), None)
        for key in space.names_of(name):
            if key in state and other is not None and state.meta(key)[0][1:] == base.meta(other)[0][1:]:
                found[key] = other
    return found


def _other_tokens(ours: Vocabulary | None, theirs: Vocabulary | None) -> Iterator[str]:
    if ours is None or theirs is None or ours.numbers == theirs.numbers:
        return
    a, b = ours.numbers, theirs.numbers
    moved = sorted(token for token in a.keys() & b.keys() if a[token] != b[token])
    said = {
        "it has more tokens": sorted(b.keys() - a.keys()),
        "it lacks tokens": sorted(a.keys() - b.keys()),
        "tokens have other numbers": moved,
    }
    yield from (f"{what}: {some(tokens)}" for what, tokens in said.items() if tokens)


def _other_sizes(keys: Mapping[str, str], base: State, state: State) -> Iterator[str]:
    for key, other in keys.items():
        theirs, ours = list(state.meta(key)[0]), list(base.meta(other)[0])
        if theirs != ours:
            yield f"{key} is {theirs}, the base's {ours}"


def _other_uses(ours: Vocabulary | None, theirs: Vocabulary | None) -> Iterator[str]:
    """Differences that no embedding knows of; what one of both leaves open is none."""
    if ours is None or theirs is None:
        return
    for role in sorted(ours.special.keys() & theirs.special.keys()):
        if ours.special[role] != theirs.special[role]:
            yield f"its {role} is {theirs.special[role]}, the base's {ours.special[role]}"
    if ours.template and theirs.template and ours.template != theirs.template:
        yield "it has another chat template"


def _rows(ours: Vocabulary | None, theirs: Vocabulary | None, size: int, held: int) -> Tensor:
    """Which of the expert's rows is that of each of the base's: the same token's, or -1; padding stays in its place."""
    rows_V = torch.arange(size)
    if ours is not None and theirs is not None:
        known = [(row, theirs.numbers.get(token, -1)) for token, row in ours.numbers.items() if row < size]
        places, found = torch.tensor(known, dtype=torch.long).reshape(-1, 2).T
        rows_V[places] = found
    return torch.where(rows_V < held, rows_V, -1)
