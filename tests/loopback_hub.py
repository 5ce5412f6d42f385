"""A stand-in for the Hub on the loopback interface: enough of its protocol for the real ``huggingface_hub`` client.

Repositories are lists of commits in memory. As on the Hub, a commit goes to a branch that exists (404 otherwise; a new
one starts at the head of ``main``), and one whose header names a ``parentCommit`` only onto that head (412 otherwise).
Faults can be injected: errors, cut connections, lost answers, wrong bytes.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

from tests.support.fresh_process import ROOT, ForkServer

TOKEN = "hf_test_token_that_is_never_printed"
USER = "tester"
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}
_LFS = (".safetensors", ".parquet", ".bin", ".png", ".onnx")
_REPO = r"(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)"
_API = rf"/api/(?P<kind>models|datasets|spaces)/{_REPO}"
_PLAIN = rf"/(?:(?P<kind>datasets|spaces)/)?{_REPO}"


@dataclass
class Stored:
    """A file of a commit."""

    data: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """Git's name of what git itself stores: the file, or a pointer to it."""
        text = self.data
        if self.is_lfs:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(text)}\n"
            text = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        """As the API lists it."""
        found: dict[str, Any] = {"type": "file", "oid": self.oid, "size": len(self.data), "path": path}
        if self.is_lfs:
            found["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 130}
        return found


@dataclass
class Commit:
    """A state of a repository."""

    oid: str
    files: dict[str, Stored]
    message: str


@dataclass
class Repo:
    """A repository: its commits, and what points to them."""

    private: bool = False
    sdk: str | None = None
    commits: list[Commit] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, files: dict[str, Stored], message: str, ref: str = "main") -> Commit:
        commit = Commit(hashlib.sha1(os.urandom(8)).hexdigest(), files, message)
        self.commits.append(commit)
        self.refs[ref] = commit.oid
        return commit

    def at(self, revision: str) -> Commit | None:
        oid = self.refs.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == oid), None)


@dataclass
class Fault:
    """What goes wrong with the next requests that match.

    Args:
        pattern: Of ``"METHOD /path"``.
        kind: ``"500"``; ``"drop"``: the connection is cut in the middle, and nothing is changed; ``"lost"``: what was
            asked for is done, and the connection is cut before the answer; ``"damage"``: one byte is wrong; ``"slow"``.
        times: How often.
    """

    pattern: str
    kind: str
    times: int = 1


class Hub:
    """The stored repositories, the faults to come, and what was asked for."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.url = ""
        self.nonce = ""

    @functools.cached_property
    def key(self) -> RSAKey:
        """Signs who has logged in."""
        return RSAKey.generate_key(2048, private=True)

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The files of a revision."""
        commit = self.repos[kind, repo_id].at(revision)
        assert commit is not None
        return {path: stored.data for path, stored in commit.files.items()}

    def put(self, repo_id: str, files: dict[str, bytes], kind: str = "model", private: bool = False) -> None:
        """Store a repository as if it had been pushed."""
        repo = self.repos.setdefault((kind, repo_id), Repo(private=private))
        repo.add({path: Stored(data, path.endswith(_LFS)) for path, data in files.items()}, "put")

    def fail(self, pattern: str, kind: str, times: int = 1) -> None:
        """Have the next requests that match go wrong, see :class:`Fault`."""
        self.faults.append(Fault(pattern, kind, times))

    def fault_for(self, request: str) -> str | None:
        for fault in self.faults:
            if fault.times and re.search(fault.pattern, request):
                fault.times -= 1
                return fault.kind
        return None


@contextlib.contextmanager
def listening() -> Iterator[Callable[[], Hub]]:
    """A free port until the end of the block, and a function that puts a new hub there in place of the one before."""
    handler = type("BoundHandler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True

    def renew() -> Hub:
        hub = Hub()
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        handler.hub = hub
        return hub

    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield renew
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    """A hub that listens on a free port until the end of the block."""
    with listening() as renew:
        yield renew()


def client_environment(hub: Hub, home: Path) -> dict[str, str | None]:
    """What a process needs in its environment so that its Hub is this one; what must not be there is ``None``."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_TOKEN", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"))
    settings = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**offline, **settings, "HF_ENDPOINT": hub.url, "HF_HOME": str(home)}


COMMAND = "import runpy; runpy.run_module('hf_prune', run_name='__main__', alter_sys=True)"
# A client tries again after a second, two, four …; here nothing gets better by waiting.
_IMPATIENT = "import time as _time; _time.sleep = lambda seconds, _sleep=_time.sleep: _sleep(min(seconds, 0.01))\n"


def run_client(
    hub: Hub,
    home: Path,
    *command: str,
    token: str | None = TOKEN,
    code: int = 0,
    processes: ForkServer | None = None,
) -> str:
    """Run Python code, or a command of hf-prune, as a process whose Hub this is.

    Args:
        hub: The hub.
        home: The client's cache.
        *command: One piece of Python code, or the words after ``hf-prune``.
        token: What the client logs in with.
        code: The exit code that is expected.
        processes: Where to fork the process, started with :func:`client_environment`. Otherwise an interpreter starts.

    Returns:
        What it printed, stdout and stderr; no token is in it.
    """
    source, *words = command if len(command) == 1 else (COMMAND, *command)
    source = _IMPATIENT + source
    login = {} if token is None else {"HF_TOKEN": token}
    if processes is None:
        environment = {
            **os.environ,
            **client_environment(hub, home),
            **login,
            "PYTHONPATH": ROOT,
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", source, *words],
            env={name: value for name, value in environment.items() if value is not None},
            capture_output=True,
            text=True,
            timeout=180,
            cwd=home.parent,
        )
    else:
        done = processes.run(source, *words, cwd=home.parent, **login)
    said = done.stdout + done.stderr
    assert done.returncode == code, said[-3000:]
    assert TOKEN not in said
    return said


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    answer_is_lost = False

    def log_message(self, format: str, *args: Any) -> None:
        """Be silent."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _handle(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), {k: v[0] for k, v in parse_qs(url.query).items()}
        body = self._body()
        request = f"{self.command} {path}"
        self.hub.log.append(request)
        fault = self.hub.fault_for(request)
        if fault == "500":
            return self._error(500, "", "internal error")
        if fault == "slow":
            time.sleep(1.0)
        if fault == "drop" and self.command in ("PUT", "POST"):
            return self._cut()
        self.answer_is_lost = fault == "lost"
        for method, pattern, action in _ROUTES:
            if method == self.command or (method == "GET" and self.command == "HEAD"):
                if (match := re.fullmatch(pattern, path)) is not None:
                    return action(self, match.groupdict(), query, body, fault)
        return self._error(404, "", f"the stand-in knows no {request}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    # --- answers ---------------------------------------------------------------------------------------------

    def _send(self, data: bytes, status: int = 200, **headers: str) -> None:
        if self.answer_is_lost:
            return self._cut()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        self._send(json.dumps(value).encode(), status, **headers)

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X_Error_Code": code, "X_Error_Message": message} if code else {}
        self._json({"error": message}, status, **headers)

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.close()

    @property
    def _logged_in(self) -> bool:
        return self.headers.get("Authorization", "") == f"Bearer {TOKEN}"

    def _find(self, parts: dict[str, Any]) -> tuple[str, Repo] | None:
        """The repository that a path names, or an answer that it is not there for this client."""
        repo_id = f"{parts['owner']}/{parts['name']}"
        repo = self.hub.repos.get((KINDS[parts["kind"] or "models"], repo_id))
        if repo is None or (repo.private and not self._logged_in):
            self._error(404 if self._logged_in else 401, "RepoNotFound", "Repository not found")
            return None
        return repo_id, repo

    def _may_write(self, owner: str) -> bool:
        if not self._logged_in:
            self._error(401, "", "Invalid credentials")
        elif owner != USER:
            self._error(403, "", f"You don't have the rights to write to {owner}")
        else:
            return True
        return False

    # --- login with OAuth -------------------------------------------------------------------------------------

    def openid(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        places = {f"{name}_endpoint": f"{self.hub.url}/oauth/{name}" for name in ("authorization", "token", "userinfo")}
        self._json({"issuer": self.hub.url, "jwks_uri": f"{self.hub.url}/oauth/jwks", **places})

    def authorize(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        """Whoever comes agrees at once."""
        self.hub.nonce = query["nonce"]
        back = query["redirect_uri"] + ("&" if "?" in query["redirect_uri"] else "?")
        self._send(b"", 302, Location=f"{back}{urlencode({'code': 'agreed', 'state': query['state']})}")

    def token(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        if parse_qs(body.decode()).get("code") != ["agreed"]:
            return self._error(400, "", "invalid_grant")
        now = int(time.time())
        claims = {"iss": self.hub.url, "sub": "1", "aud": "client", "exp": now + 3600, "iat": now}
        claims |= {"nonce": self.hub.nonce, "preferred_username": USER, "name": USER, "profile": "", "picture": ""}
        signed = jwt.encode({"alg": "RS256", "kid": "test"}, claims, self.hub.key)
        scopes = "openid profile write-repos manage-repos"
        answer = {"access_token": TOKEN, "token_type": "bearer", "expires_in": 3600, "scope": scopes}
        return self._json({**answer, "id_token": signed})

    def jwks(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        self._json({"keys": [{**self.hub.key.as_dict(private=False), "kid": "test", "use": "sig", "alg": "RS256"}]})

    # --- the API ------------------------------------------------------------------------------------------------

    def whoami(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        if not self._logged_in:
            return self._error(401, "", "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return self._json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": access})

    def create(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        wanted = json.loads(body)
        owner, kind = wanted.get("organization") or USER, wanted.get("type") or "model"
        if not self._may_write(owner):
            return None
        repo_id = f"{owner}/{wanted['name']}"
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            return self._json({"error": "You already created this repo", "url": url}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        repo = self.hub.repos[kind, repo_id] = Repo(private=private, sdk=wanted.get("sdk"))
        repo.add({".gitattributes": Stored(b"", False)}, "initial commit")
        return self._json({"url": url, "name": repo_id, "id": repo_id})

    def validate(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        if (found := self._find(parts)) is None or not self._may_write(parts["owner"]):
            return None
        current = found[1].at(parts["rev"])
        files = []
        for each in json.loads(body)["files"]:
            old = current.files.get(each["path"]) if current else None
            mode = "lfs" if each["path"].endswith(_LFS) or each["size"] > 10 << 20 else "regular"
            name = None if old is None else old.oid
            files.append({"path": each["path"], "uploadMode": mode, "shouldIgnore": False, "oid": name})
        return self._json({"files": files, "commitOid": current.oid if current else None})

    def lfs_batch(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            answer = {"oid": each["oid"], "size": each["size"]}
            if each["oid"] not in self.hub.blobs:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}
            objects.append(answer)
        self._json({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def lfs_put(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        if hashlib.sha256(body).hexdigest() != parts["oid"]:
            return self._error(400, "", "the content is not what its name says")
        self.hub.blobs[parts["oid"]] = body
        return self._send(b"")

    def commit(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        """Onto the head of a branch that exists; if the header has a ``parentCommit``, only while that is the head.

        A proposal starts at its ``parentCommit``, wherever the branch is.
        """
        if (found := self._find(parts)) is None or not self._may_write(parts["owner"]):
            return None
        repo_id, repo = found
        parent = repo.at(parts["rev"]) if parts["rev"] in repo.refs else None
        if parent is None:
            return self._error(404, "RevisionNotFound", f"no branch {parts['rev']}")
        files, message, proposal = dict(parent.files), "", query.get("create_pr") == "1"
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                named = value.get("parentCommit")
                if named not in (None, parent.oid):
                    older = repo.at(named) if proposal else None
                    if older is None:
                        return self._error(412, "", f"{parts['rev']} is at {parent.oid}, and not at {named}")
                    files = dict(older.files)
            elif item["key"] == "file":
                files[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self._error(400, "", f"{value['path']} was not uploaded")
                files[value["path"]] = Stored(self.hub.blobs[value["oid"]], True)
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        ref = parts["rev"]
        if proposal:
            number = sum(name.startswith("refs/pr/") for name in repo.refs) + 1
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        new = repo.add(files, message, ref)
        return self._json({**answer, "commitOid": new.oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{new.oid}"})

    def branch(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        """A new branch, at the starting point that the request names, or at the head of ``main``."""
        if (found := self._find(parts)) is None or not self._may_write(parts["owner"]):
            return None
        start = found[1].at(json.loads(body or b"{}").get("startingPoint") or "main")
        if parts["rev"] in found[1].refs:
            return self._error(409, "", "the branch exists")
        if start is None:
            return self._error(404, "RevisionNotFound", "no such starting point")
        found[1].refs[parts["rev"]] = start.oid
        return self._json({})

    def info(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        if (found := self._find(parts)) is None:
            return None
        repo_id, repo = found
        commit = repo.at(parts.get("rev") or "main")
        if commit is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        date = "2026-01-01T00:00:00.000Z"
        base = {"_id": "0", "id": repo_id, "modelId": repo_id, "author": parts["owner"], "sha": commit.oid}
        base |= {"private": repo.private, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        base |= {"lastModified": date, "createdAt": date, "sdk": repo.sdk, "cardData": {}}
        files = [{"rfilename": path, "size": len(stored.data)} for path, stored in commit.files.items()]
        return self._json({**base, "siblings": files})

    def tree(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        if (found := self._find(parts)) is None:
            return None
        commit = found[1].at(parts["rev"])
        if commit is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        prefix = f"{parts['sub'].rstrip('/')}/" if parts.get("sub") else ""
        deep = query.get("recursive", "").lower() in ("true", "1")
        inside = {path: f for path, f in sorted(commit.files.items()) if path.startswith(prefix)}
        if prefix and not inside:
            return self._error(404, "EntryNotFound", f"{prefix} does not exist")
        folders = {prefix + path.removeprefix(prefix).split("/")[0] for path in inside if "/" in path[len(prefix) :]}
        listed = [f.entry(path) for path, f in inside.items() if deep or "/" not in path[len(prefix) :]]
        listed += [{"type": "directory", "oid": "0" * 40, "size": 0, "path": name} for name in sorted(folders)]
        return self._json(listed)

    def paths_info(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        if (found := self._find(parts)) is None:
            return None
        commit = found[1].at(parts["rev"])
        is_json = "json" in self.headers.get("Content-Type", "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        files = commit.files if commit else {}
        return self._json([files[path].entry(path) for path in paths if path in files])

    def refs(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        if (found := self._find(parts)) is None:
            return None
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in found[1].refs.items()
            if not name.startswith("refs/")
        ]
        answer: dict[str, Any] = {"branches": branches, "tags": [], "converts": []}
        if query.get("include_prs") == "1":
            proposals = {name: oid for name, oid in found[1].refs.items() if name.startswith("refs/pr/")}
            listed = [
                {"name": name.rpartition("/")[2], "ref": name, "targetCommit": o} for name, o in proposals.items()
            ]
            answer["pullRequests"] = listed
        return self._json(answer)

    def resolve(self, parts: Any, query: Any, body: bytes, fault: str | None) -> None:
        if (found := self._find(parts)) is None:
            return None
        commit = found[1].at(parts["rev"])
        if commit is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        stored = commit.files.get(parts["path"])
        if stored is None:
            return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {"X_Repo_Commit": commit.oid, "ETag": f'"{stored.etag}"', "Accept_Ranges": "bytes"}
        headers["Content_Type"] = "application/octet-stream"
        if stored.is_lfs:
            headers |= {"X_Linked_Etag": f'"{stored.etag}"', "X_Linked_Size": str(len(stored.data))}
        data, status = stored.data, 200
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(asked[1] or 0)
            last = min(int(asked[2] or len(data) - 1), len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if self.command == "GET" and fault == "damage" and data:
            data = data[:-1] + bytes([data[-1] ^ 1])
        if self.command == "GET" and fault == "drop":
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            return self._cut()
        return self._send(data, status, **headers)


_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/\.well-known/openid-configuration", _Handler.openid),
    ("GET", r"/oauth/authorization", _Handler.authorize),
    ("POST", r"/oauth/token", _Handler.token),
    ("GET", r"/oauth/jwks", _Handler.jwks),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"{_API}/preupload/(?P<rev>.+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<rev>.+)", _Handler.commit),
    ("POST", rf"{_API}/branch/(?P<rev>.+)", _Handler.branch),
    ("POST", rf"{_API}/paths-info/(?P<rev>[^/]+)", _Handler.paths_info),
    ("GET", rf"{_API}/tree/(?P<rev>[^/]+)(?:/(?P<sub>.+))?", _Handler.tree),
    ("GET", rf"{_API}/revision/(?P<rev>.+)", _Handler.info),
    ("GET", rf"{_API}/refs", _Handler.refs),
    ("GET", _API, _Handler.info),
    ("POST", rf"{_PLAIN}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.lfs_put),
    ("GET", rf"{_PLAIN}/resolve/(?P<rev>refs/pr/\d+|[^/]+)/(?P<path>.+)", _Handler.resolve),
]
