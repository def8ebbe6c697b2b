"""A stand-in of the Hub on this machine: repositories in memory, and the HTTP API that pushes and pulls need.

Endpoints and shapes are those that huggingface_hub 2.4 asks for: `/api/whoami-v2`, `/api/repos/create`,
`/api/validate-yaml`, `preupload`, `commit`, LFS batch and upload, info, `discussions`, `tree`, `paths-info`, `refs`,
and `resolve`.
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
        self.users = {"hf_ownerTokenThatNobodyMaySee00000001": "me", "hf_guestTokenThatNobodyMaySee00000002": "guest"}
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


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args) -> None:
        """Tests read `requests` instead."""

    def reply(self, status: int, body=b"", **headers: str) -> None:
        """Sends bytes, or anything else as JSON."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if not {"Content_Length"} & set(headers):
            self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def refuse(self, status: int, code: str, message: str) -> None:
        """An error as the Hub sends it."""
        self.reply(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def handle_request(self) -> None:
        """Routes, for all methods."""
        raw_path = urlsplit(self.path).path
        self.query = parse_qs(urlsplit(self.path).query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = self.server.users.get(token)
        self.server.requests.append((self.command, unquote(raw_path), self.user))
        if self.server.fail_at and self.server.fail_at in raw_path:
            if self.server.fail_at == "commit":
                self.close_connection = True
                self.connection.close()
                return
            # An unkind server: it repeats the token to whoever reads its message.
            self.refuse(403, "", f"refused for {token}")
            return
        if token and self.user is None:
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return
        for pattern, action in ROUTES:
            match = re.fullmatch(pattern, raw_path)
            if match:
                action(self, **{name: unquote(value) for name, value in match.groupdict("").items()})
                return
        self.refuse(404, "", f"no such address: {raw_path}")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    # --- finding ---

    def find(self, kind: str, name: str, *, write: bool = False) -> Repo | None:
        """The repository, or `None` after an answer that says why not."""
        repo = self.server.repos.get((kind or "model", name))
        owner = name.partition("/")[0]
        if repo is None or (repo.private and self.user != owner):
            self.refuse(404 if self.user else 401, "RepoNotFound", "Repository not found")
            return None
        if write and self.user != owner:
            self.refuse(403, "", f"you do not have write access to {name}")
            return None
        return repo

    def tree_of(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch or commit, or `None` after an answer."""
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits and not (revision == "main" and not repo.history):
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return sha, repo.commits.get(sha, {})

    # --- the API ---

    def whoami(self) -> None:
        if self.user is None:
            self.refuse(401, "", "Invalid username or password.")
        else:
            self.reply(200, {"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or self.user
        kind, name = wanted.get("type") or "model", f"{owner}/{wanted['name']}"
        if self.user != owner:
            self.refuse(403 if self.user else 401, "", f"you may not create repositories of {owner}")
            return
        url = f"{self.server.url}/{'datasets/' if kind == 'dataset' else ''}{name}"
        if (kind, name) in self.server.repos:
            self.reply(409, {"error": "You already created this repo", "url": url})
            return
        self.server.repos[kind, name] = Repo(wanted.get("visibility") == "private")
        self.reply(200, {"url": url, "name": name})

    def validate_yaml(self) -> None:
        front = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        licences = (None, "mit", "cc0-1.0", "other")
        errors = [] if front.get("license") in licences else [{"message": "no such licence"}]
        self.reply(400 if errors else 200, {"errors": errors, "warnings": []})

    def info(self, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name)
        found = repo and self.tree_of(repo, revision or "main")
        if not found:
            return
        sha, files = found
        card = files.get("README.md", b"").decode().split("---")
        self.reply(
            200,
            {
                "id": name,
                "sha": sha if repo.history else None,
                "private": repo.private,
                "siblings": [
                    sibling(path, content, "blobs" in self.query and self.server.tells_hashes)
                    for path, content in files.items()
                ],
                "cardData": yaml.safe_load(card[1]) if len(card) > 2 else None,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            },
        )

    def discussions(self, kind: str, name: str) -> None:
        repo = self.find(kind, name)
        if repo is None:
            return
        author = self.query.get("author", [None])[0]
        start = 2 * int(self.query.get("p", ["0"])[0])
        # Newest first, and in pages, of which the Hub's hold more.
        listed = [each for each in reversed(repo.pull_requests) if author in (None, each["author"])]
        page = [
            each
            | {
                "author": {"name": each["author"]},
                "createdAt": "2024-01-01T00:00:00.000Z",
                "repo": {"name": name, "type": kind},
                "isPullRequest": True,
            }
            for each in listed[start : start + 2]
        ]
        self.reply(200, {"count": len(listed), "start": start, "discussions": page})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name, write=True)
        found = repo and self.tree_of(repo, revision)
        if not found:
            return
        files = [
            {
                "path": each["path"],
                "uploadMode": "lfs" if each["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": oid(each["path"], found[1][each["path"]]) if each["path"] in found[1] else None,
            }
            for each in json.loads(self.body)["files"]
        ]
        self.reply(200, {"files": files})

    def lfs_batch(self, kind: str, name: str) -> None:
        if self.find(kind, name, write=True) is None:
            return
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
            for each in json.loads(self.body)["objects"]
        ]
        self.reply(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            self.refuse(400, "", "content and name differ")
            return
        self.server.lfs[digest] = self.body
        self.reply(200)

    def commit(self, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name, write=True)
        found = repo and self.tree_of(repo, revision)
        if not found:
            return
        sha, files = found[0], dict(found[1])
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                if value.get("parentCommit", sha) != sha:
                    self.refuse(412, "", "a commit has happened since")
                    return
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
            else:
                del files[value["path"]]
        new = repo.commit(files, revision)
        self.reply(200, {"commitUrl": f"{self.server.url}/{name}/commit/{new}", "commitOid": new, "hookOutput": ""})

    def tree(self, kind: str, name: str, revision: str, path: str) -> None:
        repo = self.find(kind, name)
        found = repo and self.tree_of(repo, revision)
        if not found:
            return
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        prefix = f"{path}/" if path else ""
        entries, folders = [], {}
        for each, content in sorted(found[1].items()):
            rest = each.removeprefix(prefix)
            if not each.startswith(prefix):
                continue
            parents = rest.split("/")[:-1]
            for depth in range(1, (len(parents) if recursive else min(1, len(parents))) + 1):
                folder = prefix + "/".join(parents[:depth])
                folders[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            if recursive or not parents:
                entries.append(file_entry(each, content))
        if path and not entries and not folders:
            self.refuse(404, "EntryNotFound", f"{path} does not exist on {revision}")
            return
        self.reply(200, [*folders.values(), *entries])

    def paths_info(self, kind: str, name: str, revision: str) -> None:
        repo = self.find(kind, name)
        found = repo and self.tree_of(repo, revision)
        if not found:
            return
        is_json = "json" in (self.headers.get("Content-Type") or "")
        paths = json.loads(self.body)["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        entries = [file_entry(path, found[1][path]) for path in paths if path in found[1]]
        for path in paths:
            if path not in found[1] and any(each.startswith(f"{path}/") for each in found[1]):
                entries.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self.reply(200, entries)

    def refs(self, kind: str, name: str) -> None:
        repo = self.find(kind, name)
        if repo is not None:
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in repo.branches.items()]
            self.reply(200, {"branches": branches, "converts": [], "tags": []})

    def resolve(self, prefix: str, name: str, revision: str, path: str) -> None:
        repo = self.find(prefix.rstrip("s/") or "model", name)
        found = repo and self.tree_of(repo, revision)
        if not found:
            return
        sha, files = found
        if path not in files:
            self.refuse(404, "EntryNotFound", f"{path} does not exist on {revision}")
            return
        content = files[path]
        common = {"X_Repo_Commit": sha, "ETag": f'"{oid(path, content)}"', "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            where = f"bytes {start}-{end}/{len(content)}"
            self.reply(206, content[start : end + 1], Content_Range=where, **common)
        else:
            self.reply(200, content, **common)


def oid(path: str, content: bytes) -> str:
    """Git's id of a file, or SHA-256 for large files."""
    if path.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sibling(path: str, content: bytes, with_hashes: bool) -> dict:
    """A file in `info`."""
    entry = {"rfilename": path}
    if with_hashes:
        entry |= {"size": len(content), "blobId": oid("", content)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"sha256": oid(path, content), "size": len(content), "pointerSize": 134}
    return entry


def file_entry(path: str, content: bytes) -> dict:
    """A file in `tree` and `paths-info`."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid(path, content)}
    if path.endswith(LFS_SUFFIXES):
        entry |= {"lfs": {"oid": oid(path, content), "size": len(content), "pointerSize": 134}}
    return entry


_API = r"/api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)"
ROUTES = [
    (r"/api/whoami-v2", Handler.whoami),
    (r"/api/repos/create", Handler.create),
    (r"/api/validate-yaml", Handler.validate_yaml),
    (_API, lambda handler, **found: handler.info(revision="", **found)),
    (_API + r"/revision/(?P<revision>[^/]+)", Handler.info),
    (_API + r"/preupload/(?P<revision>[^/]+)", Handler.preupload),
    (_API + r"/commit/(?P<revision>[^/]+)", Handler.commit),
    (_API + r"/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", Handler.tree),
    (_API + r"/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    (_API + r"/refs", Handler.refs),
    (_API + r"/discussions", Handler.discussions),
    (r"/(?P<kind>)(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (
        r"/datasets/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
        lambda handler, name: handler.lfs_batch("dataset", name),
    ),
    (r"/lfs/(?P<digest>[0-9a-f]{64})", Handler.lfs_put),
    (r"/(?P<prefix>datasets/|spaces/|)(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
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
