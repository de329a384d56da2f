"""A learned merge, or its export, on the hub; and the card that goes with both."""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adamerge.artifact import EXPORTED, RECORD, WEIGHTS, is_local, pinned, portable, read_record, write_record
from adamerge.card import model_card
from adamerge.hub import card_data, full_name, push
from adamerge.naming import literal
from adamerge.types import InputError

log = logging.getLogger("adamerge")

CARD = "README.md"
_LOAD = """```python
import adamerge

merge = adamerge.load("{name}")
logits = merge(merge.prepare([sample], task={task}), task={task})
print(merge.classes({task})[logits.argmax()])
```"""
_FOLDER = re.compile(r'^folder = "[^"\n]*"$', re.MULTILINE)  # of the code in an export's card


def push_to_hub(path: str | Path, repo: str, *, private: bool = True, revision: str | None = None) -> str:
    """Upload a learned merge, which `adamerge.load` opens, or an export, which the model's own library does.

    Args:
        path: A run's directory, its `merge` folder, or a folder that `export` has written.
        repo: `org/name`, or `name` for one's own; created if it is not there.
        private: Of a new repository; one that exists stays as it is.
        revision: The branch, created if it is not there; None for the main branch.

    Returns:
        Where it is.

    Raises:
        InputError: No such folder, no token, no right to write, or no network.
    """
    folder = Path(path).expanduser()
    is_export = (folder / EXPORTED).is_file()
    record = None if is_export else read_record(folder)
    if is_export and not (folder / CARD).is_file():
        raise InputError(f"{folder} has no {CARD}; export the merge again.")
    repo = full_name(repo)
    with tempfile.TemporaryDirectory() as made:
        home = Path(made) / "pushed"
        if record is None:
            _copy_export(folder, home, repo, revision)
            message = "A merge by adamerge, exported"
        else:
            _write_merge(*record, home, f"{repo}@{revision}" if revision else repo)
            message = "A merge by adamerge"
        return push(home, repo, private=private, revision=revision, message=message)


def _write_merge(folder: Path, record: Mapping[str, Any], home: Path, name: str) -> None:
    local = list(_local(record))
    if local:
        log.warning(
            "Nobody else can load this merge: %s stand on this machine alone. Push these first and merge them by their "
            "hub ids, or push an export.",
            ", ".join(local),
        )
    home.mkdir()
    shutil.copyfile(folder / WEIGHTS, home / WEIGHTS)
    write_record(portable(record), home)
    files = f"`{WEIGHTS}` holds what was learned, `{RECORD}` how to make the model of it and of the sources."
    load = _LOAD.format(name=name, task=literal(next(iter(record["classes"]))))
    (home / CARD).write_text(card_of(record, name, files=files, load=load, library="adamerge"), encoding="utf-8")


def _local(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the parts of a merge that no other machine has."""
    yield from (who for who, entry in record["sources"].items() if is_local(entry["source"]))
    model = (record["backbone"].get("init_args") or {}).get("model")
    if isinstance(model, str) and is_local(model) and model not in (e["source"] for e in record["sources"].values()):
        yield "the backbone's model"


def _copy_export(folder: Path, home: Path, repo: str, revision: str | None) -> None:
    """Links to an export's files, with a card that loads it from the hub."""
    shutil.copytree(folder.resolve(), home, copy_function=os.symlink)
    card = (folder / CARD).read_text(encoding="utf-8")
    plain = revision is None and "folder + " not in card  # the library itself takes what it needs
    at = f', revision="{revision}"' if revision else ""
    where = f'"{repo}"' if plain else f'snapshot_download("{repo}"{at})'
    line = f"folder = {where}" if plain else f"from huggingface_hub import snapshot_download\n\nfolder = {where}"
    (home / CARD).unlink()
    (home / CARD).write_text(_FOLDER.sub(lambda _: line, card), encoding="utf-8")


def card_of(record: Mapping[str, Any], name: str, *, files: str, load: str, library: str) -> str:
    """A merge's model card, with the licences of its sources."""
    licences = {who: _licence(pinned(entry)) for who, entry in record["sources"].items()}
    return model_card(record, name=name, licences=licences, library_name=library, files=files, load=load)


def _licence(source: str) -> str | None:
    try:
        found = card_data(source).get("license")
    except InputError as error:
        log.debug("The licence of %s is not known: %s", source, error)
        return None
    return str(found) if found else None
