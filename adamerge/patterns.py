"""Regular expressions that others may have written: they are searched for in bounded time."""

import math
import re
import time

import regex  # type: ignore[import-untyped]  # as the standard library's `re`, with a limit of time

from adamerge.types import InputError

_BOUNDS, _BRACES = re.compile(r"\{(\d+)?,?(\d+)?\}"), re.compile(r"(?<!\\)\{(?!\d*,?\d*\})")
_REPEATS = 10_000  # all bounds of {3,10} multiplied: the compiler writes repeated parts out
SECONDS = 5.0  # for all names together that a pattern is searched in; a network's take milliseconds


class Pattern:
    """A compiled regular expression.

    Args:
        pattern: The expression.
        option: Where it stands, for messages.

    Raises:
        InputError: No regular expression; and, when it is searched for, one that takes too long.
    """

    def __init__(self, pattern: str, option: str) -> None:
        self._pattern, self._option, self._left = pattern, option, SECONDS
        counts = [int(count[:9]) for bounds in _BOUNDS.findall(pattern) for count in bounds if count]
        if _BRACES.search(pattern) or math.prod(max(1, count) for count in counts) > _REPEATS:
            raise InputError(
                f"`{option}` is '{pattern[:200]}', which repeats parts too often, or has a brace without a count; use "
                "* or + for the first, and a backslash before the second."
            )
        try:
            re.compile(pattern)  # whose language it is: regex has recursion and more
            self._compiled = regex.compile(pattern, regex.VERSION0)
        except (re.error, regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
            raise InputError(f"`{option}` is no regular expression: '{pattern[:200]}' ({error}).") from error

    @property
    def groups(self) -> int:
        """How many groups it has."""
        return int(self._compiled.groups)

    def search(self, text: str) -> "regex.Match[str] | None":
        """The first match anywhere in a text."""
        return self._within_time(self._compiled.search, text)

    def fullmatch(self, text: str) -> "regex.Match[str] | None":
        """The match of a whole text."""
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
