"""Small files that others wrote, read within limits: regular files, UTF-8, YAML and JSON that are plain data."""

import json
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml

from adamerge.types import InputError

LIMIT = 16 * 2**20  # bytes of a text; the class names of ImageNet-21k for eight tasks take 5 MB of a record
NODES = 1_000_000  # values in one text, those behind an alias counted wherever it stands
DEPTH = 100  # lists and mappings inside one another; our own records need ten
_DIGITS = 300  # characters of a number: YAML reads 1:2:3:… to the base of 60, in quadratic time
_INTEGERS = 2**64
_TAGS = (None, "!", *(f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")))

_SAFE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is ten times faster, and not everywhere


class _Loader(_SAFE):
    """PyYAML's safe loader, for which a date is a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in _SAFE.yaml_implicit_resolvers.items()
}


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading, in bytes; never a pipe or device, which could block or go on for ever.

    Raises:
        InputError: Something else than a regular file, such as a folder, a pipe, a socket or a device.
        OSError: No such file, or no right to read it.
    """
    check_regular(path)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(_not_regular(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(*paths: Path) -> None:
    """Refuse what is no regular file, before a library opens it by its name.

    Raises:
        InputError: Something else, such as a folder, a pipe, a socket or a device, or a link to one.
        OSError: No such file.
    """
    for path in paths:
        try:
            mode = os.stat(path).st_mode
        except ValueError as error:  # a name with a null character
            raise InputError(f"{str(path)!r} is no name of a file: {error}.") from error
        if not stat.S_ISREG(mode):
            raise InputError(_not_regular(path))


def exists(path: Path) -> bool:
    """Tell whether a path exists; False too where its name cannot be one, or may not be looked up."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or no right to look
        return False


def is_special(path: Path) -> bool:
    """Tell whether a path leads to a pipe, a socket or a device."""
    return exists(path) and not (path.is_file() or path.is_dir())


def _not_regular(path: Path) -> str:
    return f"{path} is a folder, pipe, socket or device, and not a file; put the file itself there."


def read_text(path: Path, *, limit: int = LIMIT, encoding: str = "utf-8") -> str:
    """Return the text of a file.

    Args:
        path: A regular file.
        limit: The largest number of bytes that are read.
        encoding: `utf-8`, or `utf-8-sig` for text that may begin with a byte-order mark.

    Raises:
        InputError: No such file, one that cannot be read or is no regular file, too large, or not UTF-8.
    """
    try:
        with open_regular(path) as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    if len(raw) > limit:
        raise InputError(f"{path} is larger than {limit / 2**20:g} MiB, which no file of its kind is; look into it.")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is {raw[error.start]:#04x}"
        raise InputError(f"{path} is no UTF-8 text: {where}. Save it as UTF-8, or copy it again.") from error


def read_yaml(path: Path, *, limit: int = LIMIT) -> Any:
    """Return what a YAML file holds, as plain data.

    Args:
        path: A regular file.
        limit: The largest number of bytes that are read.

    Raises:
        InputError: As `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path, limit=limit), str(path))


def parse_yaml(text: str, source: str) -> Any:
    """Return what a YAML text holds: None, booleans, numbers, texts, lists and mappings, of bounded number and depth.

    Args:
        text: The YAML.
        source: What messages call the text.

    Raises:
        InputError: No YAML, tags, values that are too many or too deep, contain themselves, or are no plain data.
    """
    check_yaml(text, source)
    try:
        value = yaml.load(text, Loader=_Loader)  # a safe loader
    except (yaml.YAMLError, ValueError, LookupError, TypeError, OverflowError, RecursionError) as error:
        raise InputError(f"{source} is no YAML of plain data: {_line(error)}.") from error
    return _plain(value, source)


def check_yaml(text: str, source: str) -> None:
    """Refuse YAML of too many values or too deep, in linear time and before any is built; any parser may then read it.

    Args:
        text: The YAML.
        source: What messages call the text.

    Raises:
        InputError: No YAML, tags, or values that are too many or too deep, or contain themselves.
    """
    sizes: dict[str | None, tuple[int, int]] = {}  # by anchor: how many values it stands for, and how deep they are
    outer: list[tuple[str | None, int, int]] = [(None, 0, 0)]  # the same of what is not closed yet, so far
    try:
        for event in yaml.parse(text, Loader=_SAFE):
            tag = getattr(event, "tag", None)
            if tag not in _TAGS and isinstance(event, yaml.NodeEvent):
                raise InputError(f"{_place(event, source)} has the tag {tag}; only plain data are read. Remove it.")
            if isinstance(event, yaml.CollectionStartEvent):
                sizes.pop(event.anchor, None)  # until it is closed: nothing contains itself
                outer.append((event.anchor, 1, 1))
                _check_depth(len(outer), event, source)
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, number, height = outer.pop()
            elif isinstance(event, yaml.ScalarEvent):
                _check_number(event, source)
                anchor, number, height = event.anchor, 1, 1
            elif isinstance(event, yaml.AliasEvent):
                if event.anchor not in sizes:
                    raise InputError(f"{_place(event, source)} has the alias *{event.anchor} to itself, or to nothing.")
                anchor, (number, height) = None, sizes[event.anchor]
            else:
                continue
            if anchor is not None:
                sizes[anchor] = number, height
            name, before, highest = outer[-1]
            outer[-1] = name, before + number, max(highest, 1 + height)
            if before + number > NODES:
                raise InputError(f"{source} holds more than {NODES:,} values, with those that aliases repeat.")
            _check_depth(len(outer) + height, event, source)
    except yaml.YAMLError as error:
        raise InputError(f"{source} is no YAML: {_line(error)}.") from error


def _check_depth(depth: int, event: Any, source: str) -> None:
    if depth > DEPTH:
        raise InputError(f"{_place(event, source)} is nested more than {DEPTH} deep.")


def _check_number(event: yaml.ScalarEvent, source: str) -> None:
    is_number = (event.implicit[0] or event.tag) and not set(event.value) - set("+-.:_0123456789")
    if is_number and len(event.value) > _DIGITS:
        raise InputError(f"{_place(event, source)} holds a number of {len(event.value):,} characters.")


def _place(event: Any, source: str) -> str:
    return f"{source}, line {event.start_mark.line + 1},"


def read_json(path: Path, *, limit: int = LIMIT) -> Any:
    """Return what a JSON file holds, as plain data.

    Args:
        path: A regular file.
        limit: The largest number of bytes that are read.

    Raises:
        InputError: As `read_text`; no JSON, or values that are too many or too deep.
    """
    try:
        value = json.loads(read_text(path, limit=limit))
    except (json.JSONDecodeError, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no JSON: {_line(error)}.") from error
    return _plain(value, str(path))


def _plain(value: Any, source: str) -> Any:
    """The value, checked to be plain data that can be written again: every part is looked at once."""
    seen: set[int] = set()
    layer, depth = [value], 0
    while layer:
        depth += 1
        inner: list[Any] = []
        for each in layer:
            if isinstance(each, (list, dict)):
                if id(each) not in seen:
                    seen.add(id(each))
                    inner += [*each, *each.values()] if isinstance(each, dict) else each
            elif not _is_writable(each):
                raise InputError(f"{source} holds {_shown(each)}, which is no plain data.")
        if depth > DEPTH:
            raise InputError(f"{source} is nested more than {DEPTH} deep.")
        if len(inner) > NODES:
            raise InputError(f"{source} holds more than {NODES:,} values.")
        layer = inner
    return value


def _is_writable(value: Any) -> bool:
    if isinstance(value, str):
        return not any("\ud800" <= letter <= "\udfff" for letter in value) if not value.isascii() else True
    if isinstance(value, int):
        return abs(value) < _INTEGERS
    return value is None or isinstance(value, float)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f"the text {value[:60]!a} with half a character (a lone surrogate)"
    return "a number beyond 64 bits" if isinstance(value, int) else f"a {type(value).__name__}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300].rstrip(".")
