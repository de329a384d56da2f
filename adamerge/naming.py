"""Names of tasks: the rules for them, and the folder names and Python literals made from them."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

from adamerge.types import raise_all

_LONGEST = 100  # characters
_UNSEEN, _JOINERS = ("Cc", "Cf", "Cs", "Zl", "Zp"), "\u200c\u200d"  # Persian and emoji are written with the joiners
_RESERVED = re.compile(r'[<>:"|?*{}]|^\.|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def check_task_names(names: Iterable[Any], where: str) -> None:
    """Refuse names of tasks that cannot be the name of a folder, a row of a table and a key all at once.

    Args:
        names: The names.
        where: The option that they stand in, such as `model.experts`.

    Raises:
        InputError: A name that is no text, empty or too long, begins or ends with a blank, holds a path separator or a
            control character, or differs from another by case alone.
    """
    raise_all(_name_problems(list(names), where), f"the names of the tasks in {where}")


def _name_problems(names: list[Any], where: str) -> Iterator[str]:
    shown: dict[str, str] = {}
    for name in names:
        wrong = _wrong_with(name)
        if wrong:
            yield f"{where} names a task {ascii(name)[:120]}, which {wrong}."
            continue
        same = shown.setdefault(unicodedata.normalize("NFKC", folder_of(name)).casefold(), name)
        if same != name:
            yield (
                f"{where} has the tasks '{same}' and '{name}', whose folders would be one on many disks. Name one of "
                "them otherwise."
            )


def _wrong_with(name: Any) -> str:
    """Return the fault of a name and how to mend it; empty for a good name."""
    if isinstance(name, bool):
        return "is no text: YAML reads on, off, yes and no as truth values. Put quotes around the name"
    if not isinstance(name, str):
        return f"is no text but a {type(name).__name__}: put quotes around the name"
    if not name.strip() or name != name.strip():
        return "is empty, or begins or ends with a blank. Give it a name without"
    if len(name) > _LONGEST:
        return f"has {len(name)} characters. Give it a name of at most {_LONGEST}"
    if name in (".", "..") or "/" in name or "\\" in name:
        return "is a path: the task's folder would lie elsewhere. Give it a name without / and \\, such as a_b for a/b"
    if any(unicodedata.category(letter) in _UNSEEN and letter not in _JOINERS for letter in name):
        return "holds a control character or half a character. Give it a name that can be printed"
    return ""


def folder_of(task: str) -> str:
    """Return the name of a task's folder: the task's own, or a form of it that every system takes, with a digest."""
    if not _RESERVED.search(task) and len(task.encode()) <= _LONGEST:
        return task
    safe = _RESERVED.sub("_", task).encode()[: _LONGEST // 2].decode(errors="ignore").rstrip(". ")
    return f"{safe}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"


def literal(text: str, *, template: bool = False) -> str:
    """Return a text as Python writes it, in double quotes; with braces doubled for a template of `str.format`."""
    quoted = json.dumps(text, ensure_ascii=False)
    return quoted.replace("{", "{{").replace("}", "}}") if template else quoted
