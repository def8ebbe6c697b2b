"""A stand-in of the Hub on this machine: repositories in memory, and the HTTP API that our pushes and pulls ask for.

Endpoints and shapes are those of huggingface_hub 2.4: `/api/whoami-v2`, `/api/repos/create`, `/api/validate-yaml`,
`preupload`, `commit`, LFS batch and upload, info, `discussions`, `tree`, and `resolve`.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".webp")
OWNER = "hf_ownerTokenThatNobodyMaySee00000001"
GUEST = "hf_guestTokenThatNobodyMaySee00000002"
USERS = {OWNER: "me", GUEST: "guest"}


@dataclass
class Repo:
    """Commits are whole trees: path -> content."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    pull_requests: list[dict] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Puts a tree on top of a branch; returns its id of 40 digits."""
        sha = hashlib.sha1(repr((len(self.history), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.history.append(sha)
        return sha

    def open_pull_request(self, files: dict[str, bytes], author: str, title: str, status: str = "open") -> str:
        """Proposes a tree; returns its commit, which `refs/pr/N` names."""
        number = len(self.pull_requests) + 1
        self.pull_requests.append({"num": number, "author": author, "title": title, "status": status})
        return self.commit(files, f"refs/pr/{number}")

    @property
    def files(self) -> dict[str, bytes]:
        """The newest tree of `main`."""
        return self.commits[self.branches["main"]]


class HubServer(ThreadingHTTPServer):
    """Repositories by `(type, name)`, users by token, and ways to fail.

    `fail_at` is the part of a path whose requests are answered with 403, or for `"commit"` broken off without an
    answer. Without `tells_hashes`, `info` gives no hashes of files. `requests` lists method, path and user of what was
    asked.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.fail_at: str | None = None
        self.tells_hashes = True

    @property
    def url(self) -> str:
        """Address to give as HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, name: str, files: dict[str, bytes], *, kind: str = "model", private: bool = False) -> Repo:
        """Makes a repository with one commit."""
        repo = self.repos[kind, name] = Repo(private)
        repo.commit(files)
        return repo


class Refusal(Exception):
    """Status, the Hub's code and a message."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args) -> None:
        """Tests read `requests` instead."""

    def reply(self, body=b"", status: int = 200, **headers: str) -> None:
        """Sends bytes, or anything else as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {**headers, "Content_Length": str(len(raw))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def handle_request(self) -> None:
        """Routes, for all methods."""
        path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = USERS.get(token)
        self.server.requests.append((self.command, unquote(path), self.user))
        try:
            if self.server.fail_at and self.server.fail_at in path:
                if self.server.fail_at == "commit":
                    self.close_connection = True
                    self.connection.close()
                    return
                # An unkind server: it repeats the token to whoever reads its message.
                raise Refusal(403, "", f"refused for {token}")
            if token and self.user is None:
                raise Refusal(401, "", "Invalid credentials in Authorization header")
            found = ((action, re.fullmatch(pattern, path)) for pattern, action in ROUTES)
            action, match = next((pair for pair in found if pair[1]), (None, None))
            if match is None:
                raise Refusal(404, "", f"no such address: {path}")
            action(self, **{name: unquote(value) for name, value in match.groupdict("").items()})
        except Refusal as error:
            status, code, message = error.args
            self.reply({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    # --- finding ---

    def find(self, kind: str, name: str, *, write: bool = False) -> Repo:
        """The repository that a user may see, or write to."""
        repo = self.server.repos.get((kind.rstrip("s/") or "model", name))
        owner = name.partition("/")[0]
        if repo is None or (repo.private and self.user != owner):
            raise Refusal(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and self.user != owner:
            raise Refusal(403, "", f"you do not have write access to {name}")
        return repo

    def tree_of(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit and files of a branch or commit."""
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits and not (revision == "main" and not repo.history):
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits.get(sha, {})

    # --- the API ---

    def whoami(self) -> None:
        self.reply({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        kind, name = wanted.get("type") or "model", f"{wanted.get('organization') or self.user}/{wanted['name']}"
        self.server.repos[kind, name] = Repo(wanted.get("visibility") == "private")
        self.reply({"url": f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{name}", "name": name})

    def validate_yaml(self) -> None:
        front = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        licences = (None, "mit", "cc0-1.0", "other")
        errors = [] if front.get("license") in licences else [{"message": "no such licence"}]
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        repo = self.find(kind, name)
        sha, files = self.tree_of(repo, revision)
        card = files.get("README.md", b"").decode().split("---")
        siblings = [{"rfilename": path} for path in files]
        if "blobs" in self.query and self.server.tells_hashes:
            for entry, (path, content) in zip(siblings, files.items(), strict=True):
                entry |= {"size": len(content), "blobId": oid("", content)}
                if path.endswith(LFS_SUFFIXES):
                    entry["lfs"] = {"sha256": oid(path, content), "size": len(content), "pointerSize": 134}
        found = {"id": name, "sha": sha if repo.history else None, "private": repo.private, "siblings": siblings}
        found |= {"cardData": yaml.safe_load(card[1]) if len(card) > 2 else None}
        self.reply(found | {"tags": [], "downloads": 0, "likes": 0})

    def discussions(self, kind: str, name: str) -> None:
        author = self.query.get("author", [None])[0]
        start = 2 * int(self.query.get("p", ["0"])[0])
        # Newest first, and in pages, of which the Hub's hold more.
        proposed = reversed(self.find(kind, name).pull_requests)
        listed = [each for each in proposed if author in (None, each["author"])]
        same = {"createdAt": "2024-01-01T00:00:00.000Z", "repo": {"name": name, "type": kind}, "isPullRequest": True}
        page = [each | {"author": {"name": each["author"]}} | same for each in listed[start : start + 2]]
        self.reply({"count": len(listed), "start": start, "discussions": page})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        _, stored = self.tree_of(self.find(kind, name, write=True), revision)
        files = [
            {
                "path": path,
                "uploadMode": "lfs" if path.endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": oid(path, stored[path]) if path in stored else None,
            }
            for path in (each["path"] for each in json.loads(self.body)["files"])
        ]
        self.reply({"files": files})

    def lfs_batch(self, kind: str, name: str) -> None:
        self.find(kind, name, write=True)
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, digest: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == digest
        self.server.lfs[digest] = self.body
        self.reply()

    def commit(self, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name, write=True)
        sha, files = self.tree_of(repo, revision)
        files = dict(files)
        for entry in map(json.loads, self.body.splitlines()):
            value = entry["value"]
            if entry["key"] == "header":
                assert value.get("parentCommit", sha) == sha
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
            else:
                del files[value["path"]]
        new = repo.commit(files, revision)
        self.reply({"commitUrl": f"{self.server.url}/{name}/commit/{new}", "commitOid": new, "hookOutput": ""})

    def tree(self, kind: str, name: str, revision: str, path: str) -> None:
        _, files = self.tree_of(self.find(kind, name), revision)
        is_recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{path}/" if path else ""
        entries, folders = [], {}
        for each, content in sorted(files.items()):
            if not each.startswith(prefix):
                continue
            parents = each.removeprefix(prefix).split("/")[:-1]
            for depth in range(1, (len(parents) if is_recursive else min(1, len(parents))) + 1):
                folder = prefix + "/".join(parents[:depth])
                folders[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            if is_recursive or not parents:
                entry = {"type": "file", "path": each, "size": len(content), "oid": oid(each, content)}
                if each.endswith(LFS_SUFFIXES):
                    entry["lfs"] = {"oid": oid(each, content), "size": len(content), "pointerSize": 134}
                entries.append(entry)
        if path and not entries and not folders:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        self.reply([*folders.values(), *entries])

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        sha, files = self.tree_of(self.find(kind, name), revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist on {revision}")
        self.reply(files[path], X_Repo_Commit=sha, ETag=f'"{oid(path, files[path])}"')


def oid(path: str, content: bytes) -> str:
    """Git's id of a file, or SHA-256 for large files."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_NAME = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>model|dataset)s/{_NAME}"
ROUTES = [
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate_yaml),
    (_API, Handler.info),
    (_API + r"/revision/(?P<revision>[^/]+)", Handler.info),
    (_API + r"/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (_API + r"/commit/(?P<revision>[^/]+)", Handler.commit),
    (_API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", Handler.tree),
    (_API + r"/discussions", Handler.discussions),
    (rf"/(?P<kind>datasets/|){_NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"/lfs/(?P<digest>[0-9a-f]{64})", Handler.lfs_put),
    (rf"/(?P<kind>datasets/|){_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


@contextmanager
def serve():
    """Runs a server on a free port of the loopback interface."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
