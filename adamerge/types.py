"""Words and aliases that every room shares.

Shape legend, as suffix letters on tensors:
T tasks · G groups of tensors · S one tensor's shape · N elements of one tensor, flattened · B batch · D features · C
classes.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

# One task's collated samples. "label" [B] stands in it only where labels are asked for, and what a teacher says of the
# samples only where an objective needs it: "expert.logits" [B, C], "expert.features" [B, D], and "expert.blocks", a
# list with one [B, D of the block] for each block of the network, means over tokens.
Batch = Mapping[str, Any]

KEPT = "merged.features"  # [B, D] in a batch: the merged features of its samples, from a merge that is not trained
ROWS = "rows"  # [N] in a batch: where among its flattened tokens [B · L] the answers stand, if not one per sample
UNLABELED = -100  # the label of a sample that has none: it is neither learned from nor scored


class InputError(ValueError):
    """A fault in what the user gave: says what, where and how to mend it. The command prints it as one paragraph.

    Names of others stand in messages: what moves a terminal's cursor or cannot be printed is escaped.
    """

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):  # by torch in a worker process, which raises it again with its traceback
            message = message.rpartition("adamerge.types.InputError: ")[2].strip()
        super().__init__(_EMPTY_LINES.sub("\n", _UNPRINTABLE.sub(_escape, message)))


_EMPTY_LINES = re.compile(r"\n\s*\n")
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


class NonFiniteLoss(InputError):
    """A loss or gradient became NaN or Inf; the learnables are those of the last good step."""


@dataclass(frozen=True)
class Term:
    """One part of an objective on one batch: divided only after both were summed over micro-batches and ranks."""

    sum: Tensor  # [], nats unless the objective says otherwise
    count: Tensor | int  # [], how many samples the sum holds; a filter may make it zero


@dataclass(frozen=True)
class TaskInfo:
    """The facts about a task that its modules may use; heads are made first, and know fewer."""

    name: str
    classes: Sequence[str] | None = None  # the C class names
    expert: Mapping[str, Tensor] | None = None  # the expert's checkpoint, opened lazily
    base: Mapping[str, Tensor] | None = None  # the base's
    head: nn.Module | None = None  # what makes the task's logits
    net: nn.Module | None = None  # the network, to look names and shapes up in; not to be kept
    width: int | None = None  # D of the features
    blocks: Mapping[str, int] = field(default_factory=dict)  # the network's blocks in order, with their D
    seed: int = 0  # the run's own, for initial values that are random


@dataclass
class TaskOutput:
    """The merged model's output for one task's batch, in fp32."""

    task: str
    features_BD: Tensor  # what enters the head, after the task's other modules
    logits_BC: Tensor
    blocks: Sequence[Tensor] = ()  # [B, D of the block] for each block, means over tokens, where an objective asks

    @property
    def class_logits_BC(self) -> Tensor:
        """The logits, for what takes their softmax.

        Raises:
            InputError: There is one output, whose softmax is 1 whatever the model says.
        """
        if self.logits_BC.shape[-1] == 1:
            raise InputError(
                f"Task '{self.task}' has one output, a regression: its probability is always 1, and there is nothing "
                "to learn. Take an objective on values or features, such as `Distillation` with `loss: mse`."
            )
        return self.logits_BC


def some(names: Iterable[Any]) -> str:
    """The first three names and the count, for messages: «3 (first: a, b, c)»."""
    names = list(map(str, names))
    return f"{len(names)} ({'first: ' if len(names) > 3 else ''}{', '.join(names[:3])})"


def raise_all(problems: Iterable[str], what: str) -> None:
    """Raise one `InputError` that lists every problem; do nothing when there is none."""
    problems = list(problems)
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError(
            f"{len(problems)} problems with {what}:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )
