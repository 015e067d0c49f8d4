"""A stand-in for the Hub on 127.0.0.1: the parts of its HTTP API that `huggingface_hub` uses to publish models.

Repositories with commits, branches, tags and pull requests; LFS storage that refuses bytes whose sha256 is not the announced one;
`parentCommit` as on the Hub (412 when the branch has moved); collections. Everything is in memory. `Hub.history` keeps every
tree that a branch `main` ever showed, so that a test can prove what a reader could have seen. `Hub.faults` breaks requests.
"""

import base64
import hashlib
import json
import random
import re
import socket
import struct
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "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"
LARGE = (".safetensors", ".gguf")
WHEN = "2026-01-01T00:00:00.000Z"


def git_blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file of a commit; `lfs` is the sha256 of a large one."""

    content: bytes
    lfs: str | None = None

    @property
    def oid(self):
        return git_blob(f"lfs {self.lfs}".encode() if self.lfs else self.content)

    def describe(self, path):
        info = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.lfs:
            info["lfs"] = {"oid": self.lfs, "size": len(self.content), "pointerSize": 134}
        return info


@dataclass
class Repository:
    private: bool = False
    branches: dict = field(default_factory=dict)  # name -> commit
    tags: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)  # commit -> (parent, tree, title)
    objects: dict = field(default_factory=dict)  # sha256 -> bytes
    discussions: list = field(default_factory=list)

    def resolve(self, revision):
        for names in (self.branches, self.tags, self.commits):
            if revision in names:
                return revision if names is self.commits else names[revision]
        return None

    def tree(self, revision):
        return self.commits[self.resolve(revision)][1]

    def commit(self, branch, tree, title):
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{parent} {title} {len(self.commits)} {sorted(tree)}".encode()).hexdigest()
        self.commits[oid] = (parent, tree, title)
        self.branches[branch] = oid
        return oid


class Hub:
    """The state of the server, for tests to look at and to break."""

    def __init__(self):
        self.lock = threading.RLock()
        self.repos = {}
        self.collections = {}
        self.history = {}  # repository -> every tree `main` has shown, in order
        self.requests = []  # (method, path)
        self.uploaded = Counter()  # sha256 -> bytes received whole
        self.faults = []  # functions (method, path) -> None, or what to do: status, (status, headers), "reset", "corrupt", "lost"
        self.url = ""

    def fail(self, pattern, *outcomes):
        """Break the next requests that match `pattern` ("METHOD path"), each with one outcome."""
        left = list(outcomes)

        def fault(method, path):
            return left.pop(0) if left and re.search(pattern, f"{method} {path}") else None

        self.faults.append(fault)
        return left

    def fail_often(self, share, outcomes, seed=0):
        """Break a share of all requests."""
        draw = random.Random(seed)
        self.faults.append(lambda method, path: draw.choice(outcomes) if draw.random() < share else None)

    def outcome(self, method, path):
        with self.lock:
            self.requests.append((method, path))
            return next((found for fault in self.faults if (found := fault(method, path)) is not None), None)

    def show(self, name):
        self.history.setdefault(name, []).append(dict(self.repos[name].tree("main")))

    def files(self, name, revision="main"):
        """Path -> bytes of a revision, without .gitattributes."""
        return {
            path: entry.content for path, entry in self.repos[name].tree(revision).items() if path != ".gitattributes"
        }

    def push(self, name, title="by hand", **files):
        """Somebody else's commit on main; `files` are paths with _ for dots."""
        with self.lock:
            repo = self.repos[name]
            added = {path.replace("__", "."): Entry(content) for path, content in files.items()}
            repo.commit("main", repo.tree("main") | added, title)
            self.show(name)


class Refused(Exception):
    def __init__(self, status, message, **extra):
        super().__init__(message)
        self.status, self.content = status, {"error": message, **extra}


ROUTES = []


def route(method, pattern):
    def keep(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return keep


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer()

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

    def answer(self):
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        path = address.path
        outcome = self.hub.outcome(self.command, path)
        if outcome == "reset":
            return self.reset()
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if isinstance(outcome, (int, tuple)):
            status, headers = (outcome, {}) if isinstance(outcome, int) else outcome
            return self.send(status, b'{"error": "injected"}', headers)
        try:
            content, headers = self.dispatch(path)
            status = 200
        except Refused as refused:
            content, headers, status = json.dumps(refused.content).encode(), {}, refused.status
            headers = {"X-Error-Message": str(refused), "X-Error-Code": refused.content.get("code", "")}
        if outcome == "lost":
            return self.reset()
        if outcome == "corrupt" and content:
            content = bytes([content[0] ^ 1]) + content[1:]
        return self.send(status, content, headers)

    def reset(self):
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def send(self, status, content, headers):
        length = headers.pop("Content-Length", str(len(content)))
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers, "Content-Length": length}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def dispatch(self, path):
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, function in ROUTES:
            match = pattern.fullmatch(path)
            if verb == method and match:
                self.authorize(method, path)
                with self.hub.lock:
                    result = function(self, *(unquote(part) for part in match.groups() if part))
                return result if isinstance(result, tuple) else (json.dumps(result).encode(), {})
        raise Refused(404, f"no route for {method} {path}")

    def authorize(self, method, path):
        protected = (method != "GET" or "whoami" in path) and "/lfs/" not in path
        if protected and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refused(401, "Invalid username or password.")

    @property
    def json(self):
        return json.loads(self.body or b"{}")

    def repo(self, name, revision=None):
        repo = self.hub.repos.get(name)
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not known):
            raise Refused(404, "Repository not found", code="RepoNotFound")
        if revision is not None and repo.resolve(revision) is None:
            raise Refused(404, f"Invalid rev id: {revision}", code="RevisionNotFound")
        return repo


NAME = r"([\w.-]+/[\w.-]+)"


@route("GET", "/api/whoami-v2")
def whoami(request):
    return {"type": "user", "name": "tester", "orgs": [{"name": "org"}]}


@route("POST", "/api/validate-yaml")
def validate(request):
    return {"errors": [], "warnings": []}


@route("POST", "/api/repos/create")
def create(request):
    given = request.json
    name = f"{given.get('organization') or 'tester'}/{given['name']}"
    url = {"url": f"{request.hub.url}/{name}"}
    if name in request.hub.repos:
        raise Refused(409, "You already created this model repo", **url)
    repo = Repository(private=given.get("visibility") == "private" or bool(given.get("private")))
    repo.commit("main", {".gitattributes": Entry(b"*.safetensors filter=lfs\n*.gguf filter=lfs\n")}, "initial commit")
    request.hub.repos[name] = repo
    request.hub.show(name)
    return url


@route("GET", "/api/models")
def models(request):
    author = request.query.get("author", [""])[0]
    names = [name for name in request.hub.repos if not author or name.startswith(f"{author}/")]
    return [{"_id": name, "id": name, "modelId": name} for name in names]


@route("GET", f"/api/models/{NAME}(?:/revision/([^/]+))?")
def info(request, name, revision="main"):
    repo = request.repo(name, revision)
    siblings = [{"rfilename": path} for path in repo.tree(revision)]
    return {"_id": name, "id": name, "sha": repo.resolve(revision), "private": repo.private, "siblings": siblings}


@route("GET", f"/api/models/{NAME}/tree/([^/]+)")
def tree(request, name, revision):
    return [entry.describe(path) for path, entry in sorted(request.repo(name, revision).tree(revision).items())]


@route("POST", f"/api/models/{NAME}/paths-info/([^/]+)")
def paths_info(request, name, revision):
    files = request.repo(name, revision).tree(revision)
    if request.headers.get("Content-Type", "").startswith("application/json"):
        asked = request.json["paths"]
    else:
        asked = parse_qs(request.body.decode())["paths"]
    return [files[path].describe(path) for path in asked if path in files]


@route("GET", f"/api/models/{NAME}/refs")
def refs(request, name):
    repo = request.repo(name)
    pulls = {key: value for key, value in repo.branches.items() if key.startswith("refs/pr/")}
    heads = {key: value for key, value in repo.branches.items() if key not in pulls}

    def listed(names, prefix):
        return [{"name": key, "ref": prefix + key, "targetCommit": value} for key, value in names.items()]

    return {
        "branches": listed(heads, "refs/heads/"),
        "tags": listed(repo.tags, "refs/tags/"),
        "converts": [],
        "pullRequests": listed(pulls, ""),
    }


@route("POST", f"/api/models/{NAME}/branch/([^/]+)")
def branch(request, name, branch):
    repo = request.repo(name)
    if branch in repo.branches:
        raise Refused(409, "Reference already exists")
    start = request.json.get("startingPoint", "main")
    request.repo(name, start)
    repo.branches[branch] = repo.resolve(start)
    return {}


@route("DELETE", f"/api/models/{NAME}/branch/([^/]+)")
def remove_branch(request, name, branch):
    if request.repo(name).branches.pop(branch, None) is None:
        raise Refused(404, "no such branch", code="RevisionNotFound")
    return {}


@route("POST", f"/api/models/{NAME}/tag/([^/]+)")
def tag(request, name, revision):
    repo = request.repo(name, revision)
    if request.json["tag"] in repo.tags:
        raise Refused(409, "Tag already exists")
    repo.tags[request.json["tag"]] = repo.resolve(revision)
    return {}


@route("POST", f"/api/models/{NAME}/preupload/([^/]+)")
def preupload(request, name, revision):
    files = request.repo(name, revision).tree(revision)
    answers = []
    for file in request.json["files"]:
        path = file["path"]
        large = path.endswith(LARGE) or file["size"] > 10 << 20
        known = files.get(path)
        answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
        answers.append(answer | ({"oid": known.lfs or known.oid} if known else {}))
    return {"files": answers}


@route("POST", rf"/{NAME}\.git/info/lfs/objects/batch")
def batch(request, name):
    repo = request.repo(name)
    answers = []
    for wanted in request.json["objects"]:
        answer = dict(wanted)
        if wanted["oid"] not in repo.objects:
            answer["actions"] = {"upload": {"href": f"{request.hub.url}/lfs/{name}/{wanted['oid']}"}}
        answers.append(answer)
    return {"transfer": "basic", "objects": answers}


@route("PUT", f"/lfs/{NAME}/([0-9a-f]+)")
def put(request, name, oid):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refused(400, "the bytes do not have the announced sha256")
    request.hub.repos[name].objects[oid] = request.body
    request.hub.uploaded[oid] += len(request.body)
    return {}


@route("POST", f"/api/models/{NAME}/commit/([^/]+)")
def commit(request, name, revision):
    repo = request.repo(name, revision)
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = lines[0]["value"]
    parent = header.get("parentCommit")
    if parent is not None and parent != repo.branches[revision]:
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repo.tree(revision))
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = Entry(base64.b64decode(value["content"]))
        elif line["key"] == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refused(400, f"LFS object {value['oid']} was not uploaded")
            files[value["path"]] = Entry(repo.objects[value["oid"]], value["oid"])
        elif files.pop(value["path"], None) is None:
            raise Refused(404, f"{value['path']}: not there", code="EntryNotFound")
    oid = repo.commit(revision, files, header["summary"])
    if revision == "main":
        request.hub.show(name)
    return {"success": True, "commitOid": oid, "commitUrl": f"{request.hub.url}/{name}/commit/{oid}"}


@route("GET", f"/api/models/{NAME}/discussions")
def discussions(request, name):
    repo = request.repo(name)
    status = request.query.get("status", ["all"])[0]
    wanted = {"open": ("draft", "open"), "closed": ("closed", "merged")}.get(status)
    listed = [_overview(name, item) for item in repo.discussions if wanted is None or item["status"] in wanted]
    return {"count": len(listed), "start": 0, "discussions": listed}


def _overview(name, item):
    return {
        "num": item["num"], "title": item["title"], "status": item["status"], "isPullRequest": True, "createdAt": WHEN,
        "author": {"name": "tester"}, "repo": {"name": name, "type": "model"}, "repoOwner": {"name": "tester"},
    }  # fmt: skip


@route("POST", f"/api/models/{NAME}/discussions")
def open_discussion(request, name):
    repo = request.repo(name)
    number = len(repo.discussions) + 1
    repo.discussions.append(
        {"num": number, "title": request.json["title"], "status": "draft", "base": repo.branches["main"]}
    )
    repo.branches[f"refs/pr/{number}"] = repo.branches["main"]
    return {"num": number}


@route("GET", f"/api/models/{NAME}/discussions/([0-9]+)")
def discussion(request, name, number):
    item = request.repo(name).discussions[int(number) - 1]
    changes = {"base": "refs/heads/main", "mergeCommitId": item.get("merged")}
    return _overview(name, item) | {"changes": changes, "filesWithConflicts": [], "events": []}


@route("POST", f"/api/models/{NAME}/discussions/([0-9]+)/status")
def set_status(request, name, number):
    item = request.repo(name).discussions[int(number) - 1]
    item["status"] = request.json["status"]
    data = {"status": item["status"]}
    event = {"id": "1", "type": "status-change", "createdAt": WHEN, "author": {"name": "tester"}, "data": data}
    return {"newStatus": event}


@route("POST", f"/api/models/{NAME}/discussions/([0-9]+)/merge")
def merge(request, name, number):
    repo = request.repo(name)
    item = repo.discussions[int(number) - 1]
    if item["status"] != "open":
        raise Refused(409, f"the pull request is {item['status']}")
    base, ours = repo.commits[item["base"]][1], repo.tree(f"refs/pr/{number}")
    changed = {path: entry for path, entry in ours.items() if base.get(path) != entry}
    removed = base.keys() - ours.keys()
    kept = {path: entry for path, entry in repo.tree("main").items() if path not in removed}
    item["merged"] = repo.commit("main", kept | changed, item["title"])
    item["status"] = "merged"
    request.hub.show(name)
    return {}


@route("GET", f"/{NAME}/resolve/([^/]+)/(.+)")
def resolve(request, name, revision, path):
    repo = request.repo(name, revision)
    entry = repo.tree(revision).get(path)
    if entry is None:
        raise Refused(404, f"{path}: not found", code="EntryNotFound")
    headers = {"X-Repo-Commit": repo.resolve(revision), "ETag": f'"{entry.lfs or entry.oid}"'}
    content = entry.content
    headers["Content-Length"] = str(len(content))
    return content, headers


@route("POST", "/api/collections")
def create_collection(request):
    given = request.json
    slug = f"{given['namespace']}/{given['title'].lower().replace(' ', '-')}-0123456789abcdef01234567"
    if slug in request.hub.collections:
        raise Refused(409, "exists", slug=slug)
    request.hub.collections[slug] = {"title": given["title"], "items": []}
    return _collection(request.hub, slug)


@route("GET", "/api/collections/([^/]+/[^/]+)")
def get_collection(request, slug):
    return _collection(request.hub, slug)


@route("POST", "/api/collections/([^/]+/[^/]+)/items")
def add_item(request, slug):
    items = request.hub.collections[slug]["items"]
    if request.json["item"]["id"] in items:
        raise Refused(409, "already there")
    items.append(request.json["item"]["id"])
    return _collection(request.hub, slug)


def _collection(hub, slug):
    found = hub.collections[slug]
    items = [{"_id": item, "id": item, "type": "model", "position": n} for n, item in enumerate(found["items"])]
    return {
        "slug": slug, "title": found["title"], "owner": {"name": "org"}, "items": items, "lastUpdated": WHEN, "position": 0,
        "private": False, "theme": "blue", "upvotes": 0,
    }  # fmt: skip


@contextmanager
def serve():
    """A running stand-in; yields its `Hub`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # clients that were killed
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
