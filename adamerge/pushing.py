"""A learned merge, or its export, on the hub; and the card that goes with both."""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adamerge.artifact import RECORD, WEIGHTS, read_record
from adamerge.card import model_card
from adamerge.hub import card_data, hub_id, push
from adamerge.types import InputError

log = logging.getLogger("adamerge")

CARD = "README.md"
_LOAD = """```python
import adamerge

merge = adamerge.load("{name}")
logits = merge(merge.prepare([sample], task="{task}"), task="{task}")
print(merge.classes("{task}")[logits.argmax()])
```"""


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
    if (folder / RECORD).is_file() and not (folder / WEIGHTS).is_file():  # an export
        if not (folder / CARD).is_file():
            raise InputError(f"{folder} has no {CARD}; export the merge again.")
        return push(folder, repo, private=private, revision=revision, message="A merge by adamerge, exported")
    folder, record = read_record(folder)
    local = [who for who, entry in record["sources"].items() if hub_id(entry["source"]) is None]
    if local:
        log.warning(
            "Nobody else can load this merge: %s stand on this machine alone. Push these first and merge them by their "
            "hub ids, or push an export.",
            ", ".join(local),
        )
    with tempfile.TemporaryDirectory() as made:
        for file in (RECORD, WEIGHTS):
            shutil.copyfile(folder / file, Path(made) / file)
        task = next(iter(record["classes"]))
        files = f"`{WEIGHTS}` holds what was learned, `{RECORD}` how to make the model of it and of the sources."
        load = _LOAD.format(name=repo, task=task)
        (Path(made) / CARD).write_text(card_of(record, repo, files=files, load=load, library="adamerge"))
        return push(Path(made), repo, private=private, revision=revision, message="A merge by adamerge")


def card_of(record: Mapping[str, Any], name: str, *, files: str, load: str, library: str) -> str:
    """A merge's model card, with the licences of its sources."""
    licences = {who: _licence(entry["source"]) for who, entry in record["sources"].items()}
    return model_card(record, name=name, licences=licences, library_name=library, files=files, load=load)


def _licence(source: str) -> str | None:
    try:
        found = card_data(source).get("license")
    except InputError as error:
        log.debug("The licence of %s is not known: %s", source, error)
        return None
    return str(found) if found else None
