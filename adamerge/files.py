"""Files that are either old or new, never half-written; and the cache folder."""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import platformdirs
from filelock import FileLock
from safetensors import SafetensorError

from adamerge.reading import open_regular
from adamerge.types import InputError

log = logging.getLogger("adamerge")


def cache_dir() -> Path:
    """Return the folder of demos, hashes and memory-mapped vectors: `$ADAMERGE_CACHE`, else the user's cache folder."""
    return Path(os.environ.get("ADAMERGE_CACHE") or platformdirs.user_cache_dir("adamerge")).expanduser()


def private_dirs(name: str) -> Iterator[Path]:
    """Yield folders for code that is run, as real paths: in the cache folder, then beside the user's own.

    Nobody else can look into them. A folder that another user but root can change is left out, as is one of root's.
    """
    for folder in (cache_dir() / name, Path(platformdirs.user_cache_dir(f"adamerge-{name}"))):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            real = only_ours(folder)
            if real is not None:
                real.chmod(0o700)  # one that was there; what is made in it is open to the group under some umasks
        except OSError as error:
            log.debug("%s cannot be used: %s", folder, error)
            continue
        if real is not None:
            yield real


def only_ours(path: Path) -> Path | None:
    """Return the real path of a file or folder that this user and root alone can change or replace; None for others.

    The same must hold for every folder above it. One exception: in a folder above that is open to all but sticky, as
    /tmp is, each entry belongs to its owner. Windows has no such modes, and all paths pass there.
    """
    real = Path(os.path.realpath(path, strict=True))
    for place in [*reversed(real.parents), real] if hasattr(os, "getuid") else ():
        found = place.lstat()
        is_open = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        is_sticky = place != real and found.st_mode & stat.S_ISVTX
        if found.st_uid not in (0, os.getuid()) or (is_open and not is_sticky):
            return None
    return real


_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _explained(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # as safetensors says it
        code = getattr(error, "errno", None) or (int(found[1]) if found else None)
        if code is None:
            raise
        if code not in _FULL:
            raise InputError(f"{target} cannot be written ({error}); choose another place.") from error
        raise InputError(
            f"No space left on the disk of {target.parent} while saving {target.name}. "
            "What stood there before is untouched; free some space or choose another folder and save again."
        ) from error


@contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `target` when the block ends well.

    A killed process leaves the old folder or none (beside a `.tmp-…` or `.old-…` sibling), never a mixture.
    """
    tag = uuid.uuid4().hex[:8]
    new, old = target.with_name(f"{target.name}.tmp-{tag}"), target.with_name(f"{target.name}.old-{tag}")
    try:
        with _explained(target):
            new.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
            yield new
            if target.exists():
                target.rename(old)
            new.rename(target)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to that replaces `target` when the block ends well."""
    new = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with _explained(target):
            new.parent.mkdir(parents=True, exist_ok=True)
            yield new
            os.replace(new, target)
    finally:
        with suppress(OSError):  # beside a place that is no folder there is nothing
            new.unlink(missing_ok=True)


def built_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, built by `build(folder)` if it is not there whole: one builder at a time, the others wait and read.

    A folder from which files were lost or cut short is built again.
    """
    if not _is_whole(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"The folder {target.parent} cannot be made ({error}); set ADAMERGE_CACHE.") from error
        with FileLock(f"{target}.lock"):
            for rest in target.parent.glob(f"{target.name}.tmp-*"):  # of builds that were killed: we hold the lock
                shutil.rmtree(rest, ignore_errors=True)
            if not _is_whole(target):
                if target.exists():
                    log.warning("%s is not whole and is made again.", target)
                with atomic_dir(target) as folder:
                    build(folder)
                    (folder / _MANIFEST).write_text(json.dumps(_sizes(folder)))
    return target


_MANIFEST = "manifest.json"


def _sizes(folder: Path) -> dict[str, int]:
    return {str(f.relative_to(folder)): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}


def _is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        return all(os.path.getsize(os.path.join(folder, name)) == size for name, size in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def sha256(path: Path) -> str:
    """Hex digest of a file, remembered by path, size and modification time."""
    path = path.resolve()
    now = path.stat()
    stamp = [str(path), now.st_size, now.st_mtime_ns]
    memo = cache_dir() / "sha256" / (hashlib.sha256(str(path).encode()).hexdigest()[:24] + ".json")
    try:
        known = json.loads(memo.read_text())
        if known["stamp"] == stamp:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):  # no memo, or one we cannot read: hash the file
        known = None
    found = digest(path)
    try:
        with atomic_file(memo) as new:
            new.write_text(json.dumps({"stamp": stamp, "sha256": found}))
    except (OSError, InputError) as error:  # a read-only or full cache costs time, not the run
        log.debug("The digest of %s is not remembered: %s", path, error)
    return found


def digest(path: Path) -> str:
    """Hex sha256 of a regular file, read now."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
