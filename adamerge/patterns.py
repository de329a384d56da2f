"""Regular expressions that others may have written, searched in bounded time."""

import re
import time

import regex  # type: ignore[import-untyped]  # as the standard library's `re`, with a limit of time

from adamerge.types import InputError

_SET = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]", re.DOTALL)
_BOUNDS, _BRACES = re.compile(r"\{(\d+)?,?(\d+)?\}"), re.compile(r"(?<!\\)\{(?!\d*,?\d*\})")
_REPEATS = 10_000  # letters beyond the pattern's own: the compiler writes repeated parts out
SECONDS = 5.0  # for all names together that a pattern is searched in; a network's take milliseconds


class Pattern:
    """A compiled regular expression.

    Args:
        pattern: The expression.
        option: Where it stands, for messages.

    Raises:
        InputError: The pattern is no regular expression, or repeats parts too often; in a search, it takes too long.
    """

    def __init__(self, pattern: str, option: str) -> None:
        self._pattern, self._option, self._left = pattern, option, SECONDS
        if _written_out(pattern) > len(pattern) + _REPEATS:
            raise InputError(f"`{option}` is '{pattern[:200]}', which repeats parts too often; use * or + there.")
        try:
            re.compile(pattern)  # only what `re` takes: regex adds recursion and more
            self._compiled = regex.compile(_BRACES.sub(r"\\{", pattern), regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
            raise InputError(f"`{option}` is no regular expression: '{pattern[:200]}' ({error}).") from error

    @property
    def groups(self) -> int:
        """The number of groups in the pattern."""
        return int(self._compiled.groups)

    def search(self, text: str) -> "regex.Match[str] | None":
        """Return the first match anywhere in a text."""
        return self._within_time(self._compiled.search, text)

    def fullmatch(self, text: str) -> "regex.Match[str] | None":
        """Return the match of a whole text."""
        return self._within_time(self._compiled.fullmatch, text)

    def _within_time(self, match: "regex.Callable", text: str) -> "regex.Match[str] | None":
        start = time.perf_counter()
        try:
            return match(text, timeout=max(self._left, 1e-3))
        except TimeoutError as error:
            raise InputError(
                f"`{self._option}` is '{self._pattern[:200]}', which takes more than {SECONDS:g} s to search for in "
                f"the names of tensors (in '{text[:100]}'). Repeat nothing that is itself repeated, as in (a+)+."
            ) from error
        finally:
            self._left -= time.perf_counter() - start


def _written_out(pattern: str) -> int:
    """Count the letters and sets of a pattern in which counted repeats are written out."""
    sizes, atom, place = [0], 0, 0  # of the open groups so far; of what stands before a count
    while place < len(pattern):
        counts = _BOUNDS.match(pattern, place)
        if counts and atom:
            sizes[-1] += atom * (max(int(count[:9]) for count in counts.groups("1")) - 1)
            place, atom = counts.end(), 0
            continue
        letter = pattern[place]
        if letter == "(":
            sizes.append(0)
            atom = 0
        elif letter == ")" and len(sizes) > 1:
            atom = max(1, sizes.pop())
            sizes[-1] += atom
        else:
            atom = 1
            sizes[-1] += 1
        end = _SET.match(pattern, place)
        place = end.end() if end else place + (2 if letter == "\\" else 1)
    return sum(sizes)
