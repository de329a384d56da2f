"""A model hub on this machine that speaks the routes `huggingface_hub` and `datasets` use; and the fixture `hub`.

Import it as `from tests.hub_server import served_hub  # noqa: F401`.

Without a token private and missing repositories look alike, as on the real one. Nobody may write to `stranger/`.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest
from huggingface_hub import HfFileSystem, constants, file_download, hf_api

from adamerge.hub import _answers

try:
    from huggingface_hub import close_session
except ImportError:  # huggingface_hub < 1
    from huggingface_hub.utils._http import reset_sessions as close_session

TOKEN = "hf_of_the_tester"
USER = "tester"
LARGE = (".safetensors", ".bin", ".pt", ".parquet", ".png")  # kept as the real hub keeps large files
KINDS = {"models": "model", "datasets": "dataset"}


@dataclass(frozen=True)
class Request:
    """One that the hub got, and how many bytes it answered with."""

    method: str
    path: str
    range: str | None
    sent: int


@dataclass
class Repo:
    """Its commits, each with all its files, and the branches and tags that point to them."""

    name: str
    kind: str
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files, branch, message):
        text = f"{self.name} {len(self.commits)} {sorted((name, _sha256(data)) for name, data in files.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.messages[sha], self.refs[branch] = files, message, sha
        return sha


class Refused(Exception):
    def __init__(self, status, code=None, message="Refused", commit=None):
        super().__init__(message)
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self.status, self.headers = status, {key: value for key, value in headers.items() if value}


class Hub:
    """The hub as a test sees it.

    Attributes:
        url: Its address.
        requests: What it was asked, in order.
        environment: What a subprocess needs to use it, with the caches of the test.
        failing: A status that every request gets, if any.
    """

    def __init__(self, cache):
        self.repos, self.requests, self.uploaded, self.failing = {}, [], {}, None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.environment = {
            **{"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(cache)},
            **{"HF_HUB_CACHE": str(cache / "hub"), "HF_DATASETS_CACHE": str(cache / "datasets")},
            **{"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"},
        }

    def add(self, repo, files, *, revision="main", kind="model", **of_repo):
        """Commit files (name -> bytes, text, path, or None to remove it; or a folder) on top of a branch or of main.

        `private` and `gated` are kept of the first commit. Returns the commit's hash.
        """
        home = self.repos.setdefault((kind, repo), Repo(repo, kind, **of_repo))
        if not isinstance(files, Mapping):
            files = {path.relative_to(files).as_posix(): path for path in Path(files).rglob("*") if path.is_file()}
        new = {
            name: data.read_bytes() if isinstance(data, Path) else data.encode() if isinstance(data, str) else data
            for name, data in files.items()
        }
        merged = {**self._tip(home, revision), **new}
        return home.commit({name: data for name, data in merged.items() if data is not None}, revision, "added")

    def tag(self, repo, name, *, revision="main", kind="model"):
        home = self.repos[kind, repo]
        home.refs[name] = home.refs[revision]

    def files(self, repo, *, revision="main", kind="model"):
        """Name -> bytes."""
        home = self.repos[kind, repo]
        return home.commits[home.refs.get(revision, revision)]

    def is_private(self, repo, *, kind="model"):
        return self.repos[kind, repo].private

    def sent(self, ending=""):
        """Bytes sent of files whose names end so."""
        return sum(each.sent for each in self.requests if "/resolve/" in each.path and each.path.endswith(ending))

    def stop(self):
        """No network from here on; the process asks anew whether the hub answers."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        close_session()
        _answers.cache_clear()

    @staticmethod
    def _tip(repo, branch):
        return repo.commits.get(repo.refs.get(branch) or repo.refs.get("main"), {})

    def answer(self, method, path, query, headers, body):
        """Status, headers and body."""
        if self.failing:
            raise Refused(self.failing, message="The hub is having a bad day")
        for methods, pattern, respond in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method in methods:
                groups = {key: value and unquote(value) for key, value in found.groupdict().items()}
                return respond(self, _Call(method, query, headers, body, **groups))
        raise Refused(404, message="No such page")

    def repo_of(self, call, *, write=False, download=False):
        bearer = call.headers.get("Authorization", "").removeprefix("Bearer ")
        if bearer and bearer != TOKEN:
            raise Refused(401, message="Invalid credentials in Authorization header")
        repo = self.repos.get((call.kind, call.repo))
        if (repo is None or repo.private or write) and not bearer:
            raise Refused(401, "RepoNotFound", "Invalid username or password.")
        if repo is None:
            raise Refused(404, "RepoNotFound", "Repository not found")
        if write and repo.name.startswith("stranger/"):
            raise Refused(403, message="You have no write access to this repo")
        if download and repo.gated:
            raise Refused(403, "GatedRepo", f"Access to {repo.name} is restricted")
        return repo

    def commit_of(self, call, repo):
        sha = repo.refs.get(call.revision or "main", call.revision)
        if sha not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {call.revision}")
        return sha


@dataclass
class _Call:
    method: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    kinds: str | None = None
    repo: str = ""
    revision: str | None = None
    rest: str | None = None

    @property
    def kind(self):
        return KINDS[(self.kinds or "models").strip("/")]

    @property
    def json(self):
        return json.loads(self.body)


def _info(hub, call):
    repo = hub.repo_of(call)
    sha = hub.commit_of(call, repo)
    siblings = [{"rfilename": name} for name in sorted(repo.commits[sha])]
    known = {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False, "tags": []}
    return _json(
        {"_id": sha[:24], "id": repo.name, "sha": sha, "siblings": siblings, "downloads": 0, "likes": 0} | known
    )


def _entries(files, paths):
    """Those paths of the tree that there are, as files and folders."""
    folders = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    for path in sorted(paths):
        if path in files:
            data = files[path]
            lfs = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
            large = {"lfs": lfs} if path.endswith(LARGE) else {}
            yield {"type": "file", "path": path, "size": len(data), "oid": _blob(data), **large}
        elif path in folders:
            yield {"type": "directory", "path": path, "size": 0, "oid": _sha256(path.encode())[:40]}


def _tree(hub, call):
    repo = hub.repo_of(call)
    files = repo.commits[hub.commit_of(call, repo)]
    home = (call.rest or "").strip("/")
    under = {name for name in files if not home or name.startswith(f"{home}/")}
    under |= {str(parent) for name in under for parent in Path(name).parents} - {".", home}
    if home and not under:
        raise Refused(404, "EntryNotFound", f"{home} does not exist")
    if parse_qs(call.query).get("recursive", ["false"])[0].lower() not in ("true", "1"):
        under = {name for name in under if str(Path(name).parent) == (home or ".")}
    return _json(list(_entries(files, under)))


def _paths_info(hub, call):
    repo = hub.repo_of(call)
    return _json(list(_entries(repo.commits[hub.commit_of(call, repo)], parse_qs(call.body.decode()).get("paths", []))))


def _resolve(hub, call):
    repo = hub.repo_of(call, download=True)
    sha = hub.commit_of(call, repo)
    if call.rest not in repo.commits[sha]:
        raise Refused(404, "EntryNotFound", f"{call.rest} does not exist", sha)
    data = repo.commits[sha][call.rest]
    headers = {"ETag": f'"{_etag(call.rest, data)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
    if asked is None or not data:
        return 200, headers, data
    first, last = asked.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    end = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= end:
        raise Refused(416, message="Range not satisfiable")
    return 206, {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}, data[start:end]


def _create(hub, call):
    said = call.json
    call.repo, kind = f"{said.get('organization') or USER}/{said['name']}", said.get("type") or "model"
    if call.headers.get("Authorization") != f"Bearer {TOKEN}":
        raise Refused(401, message="Invalid credentials in Authorization header")
    if call.repo.startswith("stranger/"):
        raise Refused(403, message="You don't have the rights to create a model under the namespace stranger")
    url = f"{hub.url}/{'datasets/' if kind == 'dataset' else ''}{call.repo}"
    if (kind, call.repo) in hub.repos:
        return _json({"error": "You already created this repo", "url": url}, 409)
    repo = hub.repos[kind, call.repo] = Repo(
        call.repo, kind, private=said.get("visibility") == "private" or bool(said.get("private"))
    )
    repo.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main", "initial commit")
    return _json({"url": url, "name": call.repo})


def _branch(hub, call):
    repo = hub.repo_of(call, write=True)
    if call.revision in repo.refs:
        return _json({"error": "Reference already exists"}, 409)
    repo.refs[call.revision] = repo.refs["main"]
    return _json({})


def _preupload(hub, call):
    repo = hub.repo_of(call, write=True)
    there = repo.commits[hub.commit_of(call, repo)]
    answers = []
    for path in (file["path"] for file in call.json["files"]):
        mode = "lfs" if path.endswith(LARGE) else "regular"
        known = {"oid": _etag(path, there[path])} if path in there else {}
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
    return _json({"files": answers})


def _batch(hub, call):
    hub.repo_of(call, write=True)
    objects = call.json["objects"]
    for each in objects:
        if each["oid"] not in hub.uploaded:
            upload, verify = {"href": f"{hub.url}/lfs/{each['oid']}"}, {"href": f"{hub.url}/lfs/verify"}
            each["actions"] = {"upload": upload, "verify": verify}
    return _json({"transfer": "basic", "objects": objects})


def _upload(hub, call):
    if _sha256(call.body) != call.rest:
        raise Refused(400, message="The content is not what its name says")
    hub.uploaded[call.rest] = call.body
    return 200, {}, b""


def _verify(hub, call):
    if len(hub.uploaded.get(call.json["oid"], b"")) != call.json["size"]:
        raise Refused(400, message="Not uploaded")
    return _json({})


def _commit(hub, call):
    repo = hub.repo_of(call, write=True)
    files = dict(repo.commits[hub.commit_of(call, repo)])
    message = ""
    for line in call.body.splitlines():
        key, value = (said := json.loads(line))["key"], said["value"]
        if key == "header":
            message = value["summary"]
        elif key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = hub.uploaded[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
        else:  # deletedFolder
            files = {name: data for name, data in files.items() if not name.startswith(value["path"])}
    sha = repo.commit(files, call.revision, message)
    return _json({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo.name}/commit/{sha}"})


def _whoami(hub, call):
    if call.headers.get("Authorization") != f"Bearer {TOKEN}":
        raise Refused(401, message="Invalid credentials in Authorization header")
    return _json({"type": "user", "name": USER, "fullname": USER, "orgs": []})


def _validate(hub, call):
    import yaml

    try:
        yaml.safe_load(call.json["content"].partition("---\n")[2].partition("---\n")[0])
    except yaml.YAMLError as error:
        return _json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    return _json({"errors": [], "warnings": []})


_API, _REV = "/api/(?P<kinds>models|datasets)/(?P<repo>[^/]+(?:/[^/]+)?)", "(?P<revision>[^/]+)"
_PAGE = "/(?P<kinds>datasets/)?(?P<repo>[^/]+(?:/[^/]+)?)"
_ROUTES = [  # in this order: a repository may have one name or two
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _validate),
    ("GET", "/api/whoami-v2", _whoami),
    ("GET", f"{_API}/revision/{_REV}", _info),
    ("GET", f"{_API}/tree/{_REV}(?P<rest>/.*)?", _tree),
    ("POST", f"{_API}/paths-info/{_REV}", _paths_info),
    ("POST", f"{_API}/preupload/{_REV}", _preupload),
    ("POST", f"{_API}/commit/{_REV}", _commit),
    ("POST", f"{_API}/branch/{_REV}", _branch),
    ("GET", _API, _info),
    ("POST", f"{_PAGE}\\.git/info/lfs/objects/batch", _batch),
    ("POST", "/lfs/verify", _verify),
    ("PUT", "/lfs/(?P<rest>.+)", _upload),
    ("HEAD GET", f"{_PAGE}/resolve/{_REV}/(?P<rest>.+)", _resolve),
]


def _json(value, status=200):
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _etag(path, data):
    return _sha256(data) if path.endswith(LARGE) else _blob(data)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def _serve(self):
        url = urlsplit(self.path)
        try:
            answer = self.hub.answer(self.command, url.path, url.query, self.headers, self._body())
        except Refused as refused:
            said = json.dumps({"error": str(refused)}).encode()
            answer = refused.status, {"Content-Type": "application/json", **refused.headers}, said
        status, headers, content = answer
        sent = 0 if self.command == "HEAD" else len(content)
        self.hub.requests.append(Request(self.command, unquote(url.path), self.headers.get("Range"), sent))
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(content[:sent])

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *args):
        pass


@pytest.fixture(name="hub")
def served_hub(monkeypatch, tmp_path):
    """A hub that `huggingface_hub` and `datasets` of this process use, logged in, with empty caches of their own."""
    cache = tmp_path / "huggingface"
    served = Hub(cache)
    url, home = served.url, str(cache / "hub")
    for name in ("HF_TOKEN", "NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, served.environment[name])
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    ours = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}"}
    ours |= {"HF_HUB_CACHE": home, "HUGGINGFACE_HUB_CACHE": home, "HF_TOKEN_PATH": str(cache / "token")}
    ours |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_IMPLICIT_TOKEN": False}
    for name, value in ours.items():
        monkeypatch.setattr(constants, name, value)
    template = "HUGGINGFACE_CO_URL_TEMPLATE"
    monkeypatch.setattr(file_download, template, ours[template], raising=False)  # of huggingface_hub < 1
    for name in ("AGENT_HARNESSES_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(cache / name), raising=False)
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    theirs = {"HF_ENDPOINT": url, "HUB_DATASETS_URL": url + "/datasets/{repo_id}/resolve/{revision}/{path}"}
    theirs |= {"HF_HUB_OFFLINE": False, "HF_DATASETS_CACHE": cache / "datasets"}
    for name, value in theirs.items():
        monkeypatch.setattr(datasets.config, name, value)
    _forget()
    yield served
    served.stop()
    _forget()


def _forget():
    close_session()
    _answers.cache_clear()
    HfFileSystem.clear_instance_cache()
