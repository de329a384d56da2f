"""Class names, written out or in a file of their own."""

from collections.abc import Sequence
from pathlib import Path

from adamerge.reading import read_text
from adamerge.types import InputError

_PACKAGE = Path(__file__).parent.parent


def class_names(given: Sequence[str] | str) -> list[str]:
    """Class names as they are given, or those of a text file: one on each line, in the order of the labels.

    A file that is not there is looked for among those that come with the package: `configs/classes/sun397.txt`.

    Raises:
        InputError: No such file, no text, or no names in it.
    """
    if not isinstance(given, str):
        return list(given)
    file = _found(given)
    try:
        lines = read_text(file, encoding="utf-8-sig").splitlines()
    except InputError as error:
        raise InputError(f"The class names in {file} cannot be read: {error}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise InputError(f"The file {file} holds no class names; write one on each line, in the order of the labels.")
    return names


def _found(name: str) -> Path:
    file = Path(name).expanduser()
    if file.is_file():
        return file
    if file.parts[:1] == ("configs",) and (_PACKAGE / file).is_file():
        return _PACKAGE / file
    shipped = sorted(each.relative_to(_PACKAGE).as_posix() for each in _PACKAGE.glob("configs/classes/*.txt"))
    raise InputError(
        f"There is no file of class names '{name}' (looked in {file.parent.resolve()}). Give `classes` as a list, or "
        f"name a text file with one on each line: yours, or one that comes with adamerge, {', '.join(shipped)}."
    )
