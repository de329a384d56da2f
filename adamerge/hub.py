"""The model hub where it can be reached, what is cached of it where not; and models read from it and pushed to it."""

import errno
import glob
import json
import logging
import os
import re
import socket
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies, proxy_bypass

from adamerge.reading import LIMIT, exists, open_regular, parse_yaml
from adamerge.types import InputError

log = logging.getLogger("adamerge")

_REPO = re.compile(r"(?P<repo>\w[\w.-]*(?:/\w[\w.-]*)?)(?:@(?P<revision>\S+))?", re.ASCII)
_FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz", ".yaml", ".json", ".jsonl", ".csv", ".parquet")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SMALL = (
    ".json",
    ".txt",
    ".yaml",
    ".md",
    ".model",
    ".jinja",
    ".vocab",
    ".tiktoken",
    ".bpe",
    ".spm",
)  # what stands beside weights
_TERMS = ("LICENSE", "LICENCE", "NOTICE")
_SHARDS = ".safetensors.index.json"
_PICKLE = re.compile(r"(pytorch_model|model|adapter_model|open_clip_pytorch_model|consolidated).*\.(bin|pt|pth|ckpt)")
_LOGIN = "log in with `hf auth login` or set HF_TOKEN"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def reachable(site: SplitResult, seconds: float = 3) -> bool:
    """Tell within `seconds` whether a connection can be made, to the site or to the proxy on the way there."""
    host = site.hostname or ""
    proxy = None if proxy_bypass(host) else getproxies().get(site.scheme)
    target = site if proxy is None else urlsplit(proxy if "//" in proxy else f"//{proxy}")
    address = (target.hostname or host, target.port or (443 if target.scheme == "https" else 80))
    answered = threading.Event()

    def ask() -> None:
        with suppress(OSError), socket.create_connection(address, timeout=seconds):
            answered.set()

    asking = threading.Thread(target=ask, daemon=True)  # looking up a name has no time limit of its own
    asking.start()
    asking.join(seconds)
    return answered.is_set()


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """In the block, the hub's libraries do not wait and retry for a hub that does not answer: they take what is cached.

    Whether it answers is asked once per process.
    """
    from huggingface_hub import constants

    known = [constants]
    if "datasets" in sys.modules:
        from datasets import config

        known.append(config)
    before = [module.HF_HUB_OFFLINE for module in known]
    offline = any(before) or not _answers(constants.ENDPOINT)
    if offline:
        for module in known:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        _forget_sessions()
    try:
        yield
    finally:
        for module, value in zip(known, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
        if offline:
            _forget_sessions()


def _forget_sessions() -> None:
    """Before its version 1, the hub's library asks whether it is offline only when it opens a session."""
    with suppress(ImportError):
        from huggingface_hub.utils import reset_sessions

        reset_sessions()


@cache
def _answers(endpoint: str) -> bool:
    return reachable(urlsplit(endpoint))


_Commits = dict[tuple[str, str], str]  # repository and revision -> commit
_settled: _Commits | None = None


@contextmanager
def one_commit() -> Iterator[_Commits]:
    """In the block, a branch or tag is looked up once: one that moves meanwhile does not mix commits.

    Yields what was found, which may be given to other processes, and taken from them.
    """
    global _settled
    before, _settled = _settled, {} if _settled is None else _settled
    try:
        yield _settled
    finally:
        _settled = before


@dataclass(frozen=True)
class HubId:
    """A model on the hub; `revision` is a branch, tag or commit, None for the main branch."""

    repo: str
    revision: str | None

    @property
    def is_pinned(self) -> bool:
        """True where it stands for one commit, now and later."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None


def hub_id(source: str) -> HubId | None:
    """Parse `org/name` or `name`, either with `@revision` behind or `hf-hub:` before it; None for anything else.

    Without `hf-hub:`, what exists as a path or ends like a file is local.
    """
    plain = source.removeprefix("hf-hub:")
    found = _REPO.fullmatch(plain)
    if found is None:
        return None
    if plain == source and (found["repo"].endswith(_FILES) or exists(Path(source))):
        return None
    return HubId(found["repo"], found["revision"])


def commit_of(source: str) -> str:
    """The commit, 40 hex digits, that a hub id stands for now; by the cache where the hub cannot be asked.

    Raises:
        InputError: No such repository or revision, no right to read it, or no network and not in the cache.
    """
    hub = _parsed(source)
    return str(hub.revision) if hub.is_pinned else _find(source).commit


def fetch(source: str, *, weights: bool = True, code: bool = False) -> Path:
    """The folder in the cache with a hub id's configuration, tokenizer or processor, card and terms; downloads them.

    Args:
        source: A hub id; see `hub_id`.
        weights: Also its safetensors: the shards of its index if it has one, else `model.safetensors` or the only file.
        code: Also its files in Python.

    Raises:
        InputError: As `commit_of`; or its weights are pickles, of unclear choice, or not there.
    """
    found = _find(source)
    names = [name for name in found.names if _is_small(name) or (code and name.endswith(".py"))]
    if found.offline:  # a cache that another tool filled may lack what is only read by people
        names = [name for name in names if not name.endswith(".md") and not name.startswith(_TERMS)]
    return _download(found, [*names, *_weights(found)] if weights else names)


def remote_headers(source: str) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor name to shape and storage type as safetensors calls it (`F32`), from the files' headers alone.

    Raises:
        InputError: As `fetch`.
    """
    found = _find(source)
    files = [name for name in _weights(found) if name.endswith(".safetensors")]
    with hub_or_cache(), _explained(source), ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda name: _header(found, name), files))
    return {name: meta for header in headers for name, meta in header.items()}


def card_data(source: str) -> Mapping[str, Any]:
    """The metadata at the top of the README.md of a hub id or a local folder, such as `license`; {} if there is none.

    Raises:
        InputError: As `commit_of`.
    """
    if hub_id(source) is None:
        readme = Path(source.removeprefix("local-dir:")).expanduser() / "README.md"
    else:
        found = _find(source)
        readme = _download(found, [name for name in found.names if name == "README.md"]) / "README.md"
    if not readme.is_file():
        return {}
    with open_regular(readme) as file:
        text = file.read(LIMIT).decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    block = re.match(r"\s*---[ \t]*\n(.*?)^---[ \t]*$", text, re.DOTALL | re.MULTILINE)
    try:
        data = parse_yaml(block[1], "the block") if block else None
    except InputError as error:
        log.warning("The metadata of the README.md of %s is no YAML and is not read: %s", source, error)
        return {}
    return data if isinstance(data, Mapping) else {}


def full_name(repo: str) -> str:
    """A repository's name with its owner: one's own where none is given.

    Raises:
        InputError: As `push`.
    """
    if "/" in repo:
        return repo
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise InputError(f"Pushing to '{repo}' needs a token: {_LOGIN}.")
    with hub_or_cache(), _explained(repo, writing=True):
        return f"{HfApi().whoami()['name']}/{repo}"


def push(
    folder: Path,
    repo: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str,
    token: str | None = None,
) -> str:
    """Upload a folder to the hub in one commit; safetensors and tasks of an earlier push that it lacks are removed.

    Args:
        folder: What is uploaded.
        repo: `org/name`, or `name` for one's own; created if it is not there.
        private: Of a new repository; one that exists stays as it is.
        revision: The branch, created if it is not there; None for the main branch.
        message: The commit's.
        token: None for the one of `hf auth login` or HF_TOKEN.

    Returns:
        The address of the commit.

    Raises:
        InputError: No folder, token, right or network, or a README.md that the hub refuses.
    """
    from huggingface_hub import HfApi, get_token

    if not folder.is_dir():
        raise InputError(f"There is no folder {folder} to push to '{repo}'.")
    token = token or get_token()
    if token is None:
        raise InputError(f"Pushing to '{repo}' needs a token: {_LOGIN}.")
    _answers.cache_clear()  # a run may have been long
    with hub_or_cache(), _explained(repo, writing=True):
        api = HfApi(token=token)
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        there = api.list_repo_files(name, revision=revision)
        stale = [glob.escape(file) for file in there if _is_ours(file) and not (folder / file).exists()]
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, revision=revision, commit_message=message, delete_patterns=stale or None
        )
    return str(commit.commit_url)


@dataclass(frozen=True)
class _Found:
    """One commit of a repository: where the cache keeps it, and the files it has."""

    source: str
    repo: str
    commit: str
    folder: Path
    names: tuple[str, ...]
    offline: InputError | None  # why the hub was not asked


class _UnreachableError(InputError):
    pass


def _parsed(source: str) -> HubId:
    hub = hub_id(source)
    if hub is None:
        raise InputError(f"'{source}' is no model on the hub; write org/name or org/name@revision.")
    return hub


def _find(source: str) -> _Found:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    hub = _parsed(source)
    known, asked = _settled if _settled is not None else {}, (hub.repo, hub.revision or constants.DEFAULT_REVISION)
    revision = known.get(asked, asked[1])
    with _explained(source):
        name = repo_folder_name(repo_id=hub.repo, repo_type="model")  # where a bad name is noticed
    home = Path(constants.HF_HUB_CACHE).expanduser().resolve() / name
    ref = home / "refs" / revision
    try:
        with hub_or_cache(), _explained(source):
            info = HfApi().model_info(hub.repo, revision=revision)
    except _UnreachableError as error:
        is_commit = _COMMIT.fullmatch(revision) is not None
        if not is_commit and not ref.is_file():
            raise
        commit = known[asked] = revision if is_commit else ref.read_text().strip()
        folder = home / "snapshots" / commit
        return _Found(source, hub.repo, commit, folder, _cached_names(hub.repo, commit, folder), error)
    commit = known[asked] = str(info.sha)
    if commit != revision:
        with suppress(OSError):  # a shared cache may be read-only
            _replace(ref, commit)  # for when there is no network
    names = tuple(sibling.rfilename for sibling in info.siblings or ())
    return _Found(source, hub.repo, commit, home / "snapshots" / commit, names, None)


def _replace(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    new.write_text(text)
    os.replace(new, file)


def _cached_names(repo: str, commit: str, folder: Path) -> tuple[str, ...]:
    """The files of a commit as listed when it was downloaded; where no list was kept, those downloaded."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:  # huggingface_hub < 2
        pass
    else:
        with suppress(CachedRepoTreeNotFoundError):
            return tuple(file.path for file in get_cached_repo_tree(repo, revision=commit))
    return tuple(str(file.relative_to(folder).as_posix()) for file in sorted(folder.rglob("*")) if file.is_file())


def _download(found: _Found, names: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    missing = [name for name in names if not (found.folder / name).exists()]
    if missing and found.offline:
        raise found.offline
    if missing:
        with hub_or_cache(), _explained(found.source):
            patterns = [glob.escape(name) for name in missing]
            snapshot_download(found.repo, revision=found.commit, allow_patterns=patterns)
    if found.offline and not found.folder.is_dir():
        raise found.offline
    found.folder.mkdir(parents=True, exist_ok=True)
    return found.folder


def _is_small(name: str) -> bool:
    if "/" in name:
        return name.startswith("additional_chat_templates/")
    return name.startswith(_TERMS) or (name.endswith(_SMALL) and not name.endswith(".index.json"))


def _is_ours(name: str) -> bool:
    """Tell whether an earlier push has written a file that would mislead if it stayed."""
    return name.startswith("tasks/") or ("/" not in name and name.endswith((".safetensors", _SHARDS)))


def _weights(found: _Found) -> list[str]:
    """The names of the files with the weights: one, or an index and its shards. Downloads the index."""
    entry = _entry(found)
    if not entry.endswith(_SHARDS):
        return [entry]
    index = _download(found, [entry]) / entry
    try:
        shards = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{entry} of '{found.source}' is no index of shards: it needs a 'weight_map' of tensor name to file."
        ) from error
    lost = [name for name in shards if name not in found.names]
    if lost:
        raise InputError(
            f"{entry} of '{found.source}' names {len(lost)} shards that are not there (first: {lost[0]}); "
            "name another revision after an `@`."
        )
    return [entry, *shards]


def _entry(found: _Found) -> str:
    """The index of shards, or the one file with the weights."""
    source, names = found.source, [name for name in found.names if "/" not in name]
    for usual in (f"model{_SHARDS}", "model.safetensors"):
        if usual in names:
            return usual
    for ending in (_SHARDS, ".safetensors"):
        some = sorted(name for name in names if name.endswith(ending))
        if len(some) == 1:
            return some[0]
        if some:
            raise InputError(
                f"'{source}' holds {len(some)} files *{ending}, none of which is called model{ending} "
                f"({', '.join(some[:3])}); download the one you mean with `hf download {found.repo}` and name it."
            )
    pickles = sorted(name for name in names if _PICKLE.fullmatch(name))
    if pickles:
        raise InputError(
            f"'{source}' holds its weights only as {len(pickles)} pickles (first: {pickles[0]}), which could run code "
            f"and are not read from the hub: get them (`hf download {found.repo} --local-dir FOLDER`), convert them "
            "once with `adamerge convert`, and name the converted folder."
        )
    raise found.offline or InputError(
        f"'{source}' holds no weights in safetensors; name a model that does, or a local checkpoint."
    )


def _header(found: _Found, name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    local = found.folder / name
    if local.exists():
        try:
            with open_regular(local) as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.pop("__metadata__", None)
            return {tensor: (tuple(meta["shape"]), meta["dtype"]) for tensor, meta in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, MemoryError) as error:
            raise InputError(
                f"{local} is no safetensors file ({_line(error)}); remove it to download it again."
            ) from error
    if found.offline:
        raise found.offline
    from huggingface_hub import HfApi

    remote = HfApi().parse_safetensors_file_metadata(found.repo, name, revision=found.commit)
    return {tensor: (tuple(info.shape), info.dtype) for tensor, info in remote.tensors.items()}


@contextmanager
def _explained(source: str, *, writing: bool = False) -> Iterator[None]:
    """Turn all that the hub and its library raise into one sentence."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        inner = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of an upload
        said = _said(source, inner, writing)
        if said is None:
            raise
        raise said from error


def _said(source: str, error: BaseException, writing: bool) -> InputError | None:
    from huggingface_hub import constants, errors

    site = constants.ENDPOINT
    repo, _, revision = source.removeprefix("hf-hub:").partition("@")
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"'{source}' is gated: accept its terms at {site}/{repo}, then {_LOGIN}.")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"'{repo}' has no revision '{revision}': name a branch, tag or commit of {site}/{repo}.")
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(site, source, repo, error, writing)
    if isinstance(error, errors.SafetensorsParsingError):
        return InputError(f"A file of '{source}' is no safetensors file ({error}); name another revision after an `@`.")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"'{source}' is no name on the hub ({_line(error)}); write org/name.")
    if isinstance(error, OSError) and error.errno in _DISK and not writing:
        return InputError(
            f"The cache {constants.HF_HUB_CACHE} cannot be written ({error}); free space there, or set HF_HUB_CACHE."
        )
    network = (ConnectionError, TimeoutError, errors.HfHubHTTPError.__bases__[0])  # the last: whichever HTTP library's
    if isinstance(error, network) or (isinstance(error, OSError) and error.errno is None):
        silent = f"{site} does not answer (or HF_HUB_OFFLINE is set)"
        if writing:
            return _UnreachableError(f"Nothing was pushed to '{source}': {silent}; connect and push again.")
        return _UnreachableError(
            f"'{source}' is not, or not wholly, in the cache {constants.HF_HUB_CACHE}, and {silent}: "
            "connect and try again, or name a local folder."
        )
    if writing and isinstance(error, ValueError):
        return InputError(f"The hub refuses what is pushed to '{source}': {_line(error)}")
    return None


def _refused(site: str, source: str, repo: str, error: Any, writing: bool) -> InputError | None:
    status = error.response.status_code
    reason = f"{status}: {_line(error.server_message or error)}"
    if status >= 500 or status == 429:
        kind = InputError if writing else _UnreachableError
        return kind(f"{site} cannot serve '{source}' now ({reason}); try again later.")
    if writing and status in (401, 403, 404):
        return InputError(
            f"Your token may not write to '{repo}' ({reason}): use one with write access to it "
            "(`hf auth login`, or HF_TOKEN), or another name."
        )
    if type(error).__name__ == "RepositoryNotFoundError":
        return InputError(
            f"There is no '{repo}' on {site} that you may read, and no file or folder of that name here: "
            f"check the name, or, if it is private, {_LOGIN}."
        )
    if status == 401:
        return InputError(f"{site} refuses your token ({reason}): {_LOGIN}.")
    return InputError(f"{site} refuses '{source}' ({reason}); check the name and your rights.")


def _line(error: Any) -> str:
    return " ".join(str(error).split())[:200]
