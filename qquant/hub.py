"""Publishing: a release becomes visible whole or not at all.

    every repository:   look (refs, tree)  ->  stage on a branch or a pull request  ->  download what was staged, hash it
    then, one by one:   one commit to main with `parent_commit`  ->  tag  ->  drop the branch
    then:               the collection

`main` moves in one commit per repository, from the staged and verified bytes, and only if nobody else moved it since we looked.
No repository moves before every one is staged and verified. Large files are staged one commit each, so a rerun after a kill
uploads at most the file that was under way. A tag is never moved: the same release again changes nothing, another release under
the same tag is refused. Every step looks before it acts, so it can be repeated after a lost answer: 429 and 5xx wait as long as
the server says (RateLimit, Retry-After), else 1, 2, 4 ... 60 s.

Destinations: the Hugging Face hub, ModelScope (extra `modelscope`; no branches there that a merge could move at once, so the
weights go first and the files that make a reader load them last), and a folder.
"""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from qquant.errors import EnvironmentMissingError, PublishError, QQuantError, UsageError
from qquant.output import MANIFEST
from qquant.provenance import REPORT, Payload, Repository, as_json, named_files, sha256_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ATTEMPTS = 8
LONGEST_WAIT = 60.0  # seconds, unless the server asks for more
LARGE = 10 << 20  # bytes; such files are staged in a commit of their own
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".safetensors.index.json")
LOGIN = (
    "\nLog in with `hf auth login`, or set HF_TOKEN; in CI, HF_OIDC_RESOURCE. The token must be allowed to write there"
)
VISIBLE, CHANGED = "Complete and visible", "Changed"
NOTHING = {VISIBLE: "Nothing of this release is visible on main", CHANGED: "Nothing was changed"}
HINTS = {401: LOGIN, 403: LOGIN}
SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{6,}|ms-[A-Za-z0-9-]{16,}|eyJ[\w-]+\.[\w-]+\.[\w-]+)|(?<=[?&]X-Amz-)\S+")

Say = Callable[[str], None]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Request:
    """How to publish."""

    namespace: str
    tag: str = "v1"
    private: bool = False
    pull_request: bool = False
    merge: bool = True
    collection: str | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Published:
    """What is visible now."""

    repository: str
    revision: str | None  # commit of main; None where nothing was done
    uploaded: tuple[str, ...] = ()
    state: str = "published"  # or "unchanged", "planned", "waiting"


class Destination(Protocol):
    """Where a release goes."""

    def publish(self, repositories: Sequence[Repository], request: Request) -> list[Published]:
        """Make them visible, all or none of each.

        Raises:
            PublishError: the message says what is visible.
        """
        ...


@dataclass
class Remote:
    """What the hub holds of one repository."""

    head: str | None  # commit of main; None: the repository does not exist
    files: dict[str, str] = field(default_factory=dict)  # path -> sha256 of a large file, git id of another
    refs: dict[str, str] = field(default_factory=dict)  # branches and pull requests -> commit
    tags: dict[str, str] = field(default_factory=dict)
    stale: tuple[str, ...] = ()  # files of an earlier release that this one does not have


class HuggingFace:
    """The hub; `api` carries endpoint and token."""

    def __init__(self, api: HfApi, say: Say, sleep: Callable[[float], None] = time.sleep) -> None:
        self.api = api
        self.say = say
        self.sleep = sleep

    @classmethod
    def connect(cls, endpoint: str | None, say: Say) -> HuggingFace:
        """The hub with the token that its own client finds (HF_TOKEN, `hf auth login`, HF_OIDC_RESOURCE)."""
        from huggingface_hub import HfApi
        from huggingface_hub.utils.logging import set_verbosity

        set_verbosity(logging.ERROR)  # its warnings show upload addresses, which are signed
        return cls(HfApi(endpoint), say)

    def publish(self, repositories: Sequence[Repository], request: Request) -> list[Published]:
        """See `Destination`."""
        visible: list[str] = []
        with _reported(visible):
            remotes = {
                repository.name: self._look(f"{request.namespace}/{repository.name}", repository)
                for repository in repositories
            }
            waiting = [r for r in repositories if not self._is_published(r, remotes[r.name], request)]
            done = {r.name: self._unchanged(r, remotes[r.name], request) for r in repositories if r not in waiting}
            if request.dry_run:
                done |= {r.name: self._planned(r, remotes[r.name], request) for r in waiting}
                return [done[repository.name] for repository in repositories]
            staged = {r.name: self._stage(r, remotes[r.name], request) for r in waiting}
            for repository in waiting:
                done[repository.name] = self._promote(repository, *staged[repository.name], request)
                visible.append(f"{request.namespace}/{repository.name}")
            self._collect(repositories, request)
        return [done[repository.name] for repository in repositories]

    # Looking.

    def _look(self, name: str, repository: Repository) -> Remote:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            refs = self.attempt(f"{name}: refs", lambda: self.api.list_repo_refs(name, include_pull_requests=True))
        except RepositoryNotFoundError:
            return Remote(None)
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        pulls = {ref.ref: ref.target_commit for ref in refs.pull_requests or ()}
        remote = Remote(branches.get("main"), {}, branches | pulls, {ref.name: ref.target_commit for ref in refs.tags})
        if remote.head:
            remote.files = self.tree(name, remote.head)
            remote.stale = self._stale(name, remote, repository)
        return remote

    def tree(self, name: str, revision: str) -> dict[str, str]:
        """Path -> sha256 of a large file, git id of another."""
        from huggingface_hub.hf_api import RepoFile

        entries = self.attempt(
            f"{name}: files", lambda: list(self.api.list_repo_tree(name, recursive=True, revision=revision))
        )
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}

    def _stale(self, name: str, remote: Remote, repository: Repository) -> tuple[str, ...]:
        """Files of the release that main shows now which the new one does not have.

        Raises PublishError if main holds weights that are in no manifest: readers would load a mixture.
        """
        ours: set[str] = set()
        if MANIFEST in remote.files and remote.head:
            ours = named_files([json.loads(self.download(name, remote.head, MANIFEST))])
        foreign = [
            file
            for file in remote.files
            if file.endswith(WEIGHTS) and file not in ours and file not in repository.files
        ]
        if foreign:
            raise PublishError(
                f"{name}: main holds {foreign[0]}, which no {MANIFEST} names; a release beside it would be a mixture. "
                "Delete it, or publish under another name"
            )
        return tuple(sorted(file for file in ours if file in remote.files and file not in repository.files))

    def download(self, name: str, revision: str, file: str) -> bytes:
        """A small file."""
        with tempfile.TemporaryDirectory() as folder:
            return self._fetch(name, revision, file, folder).read_bytes()

    def _fetch(self, name: str, revision: str, file: str, folder: str) -> Path:
        def download() -> Path:
            return Path(self.api.hf_hub_download(name, file, revision=revision, local_dir=folder, cache_dir=folder))

        return self.attempt(f"{name}: {file}", download)

    def _is_published(self, repository: Repository, remote: Remote, request: Request) -> bool:
        """Whether the tag marks this very release.

        Raises:
            PublishError: it marks another one.
        """
        commit = remote.tags.get(request.tag)
        if commit is None:
            return False
        name = f"{request.namespace}/{repository.name}"
        if _missing(repository, self.tree(name, commit)):
            raise PublishError(
                f"{name}: tag {request.tag} marks another release ({commit[:12]}), and tags are never moved. Give a new --tag"
            )
        return True

    def _unchanged(self, repository: Repository, remote: Remote, request: Request) -> Published:
        return Published(f"{request.namespace}/{repository.name}", remote.tags[request.tag], (), "unchanged")

    def _planned(self, repository: Repository, remote: Remote, request: Request) -> Published:
        missing = _missing(repository, remote.files)
        return Published(f"{request.namespace}/{repository.name}", remote.head, tuple(missing), "planned")

    # Staging.

    def _stage(self, repository: Repository, remote: Remote, request: Request) -> tuple[Remote, str, str]:
        """(what main was, the ref with everything on it, its verified commit)."""
        name = f"{request.namespace}/{repository.name}"
        if remote.head is None:
            self.attempt(
                f"{name}: create", lambda: self.api.create_repo(name, private=request.private or None, exist_ok=True)
            )
            remote = self._look(name, repository)
        if remote.head is None:
            raise PublishError(f"{name}: has no branch main after it was created. Nothing was published")
        ref = self._pull_request(name, repository, request) if request.pull_request else self._branch(name, repository)
        self._upload(name, ref, repository, request.tag, remote.stale if request.pull_request else ())
        commit = self.refs(name)[ref]
        self._verify(name, commit, repository)
        return remote, ref, commit

    def refs(self, name: str) -> dict[str, str]:
        """Branches and pull requests -> commit."""
        refs = self.attempt(f"{name}: refs", lambda: self.api.list_repo_refs(name, include_pull_requests=True))
        return {ref.name: ref.target_commit for ref in refs.branches} | {
            ref.ref: ref.target_commit for ref in refs.pull_requests or ()
        }

    def _branch(self, name: str, repository: Repository) -> str:
        branch = f"qquant-{repository.digest[:16]}"
        self.attempt(f"{name}: branch", lambda: self.api.create_branch(name, branch=branch, exist_ok=True))
        return branch

    def _pull_request(self, name: str, repository: Repository, request: Request) -> str:
        title = f"Release {request.tag} ({repository.digest[:16]})"

        def open_one() -> int:
            for found in self.api.get_repo_discussions(name, discussion_type="pull_request", discussion_status="open"):
                if found.title == title:
                    return found.num
            return self.api.create_pull_request(name, title=title, description="Staged by `qquant publish`.").num

        return f"refs/pr/{self.attempt(f'{name}: pull request', open_one)}"

    def _upload(self, name: str, ref: str, repository: Repository, tag: str, stale: Sequence[str]) -> None:
        """Bring `ref` to the files of `repository`: each large file in its own commit, then all others in one."""
        there = self.tree(name, ref)
        missing = _missing(repository, there)
        large = [file for file in missing if file.endswith(WEIGHTS) or repository.files[file].size > LARGE]
        small = [file for file in missing if file not in large]
        gone = [file for file in stale if file in there]
        batches = [[file] for file in large] + ([small] if small or gone else [])
        for batch in batches:
            removed = gone if batch is batches[-1] else []
            size = sum(repository.files[file].size for file in batch)
            self.say(f"{name}: staging {len(batch)} files, {size:,} bytes")

            def send(batch: list[str] = batch, removed: list[str] = removed) -> None:
                files = self.tree(name, ref)
                added = {file: repository.files[file] for file in _missing(repository, files) if file in batch}
                left = [file for file in removed if file in files]
                if added or left:
                    self.api.create_commit(
                        name, _operations(added, left), commit_message=f"Stage {tag}", revision=ref, num_threads=2
                    )

            self.attempt(f"{name}: upload", send)

    def _verify(self, name: str, commit: str, repository: Repository) -> None:
        """Download every file of the staged commit and compare its sha256.

        Raises:
            PublishError: one is missing or differs.
        """
        missing = _missing(repository, self.tree(name, commit))
        if missing:
            raise PublishError(f"{name}: {missing[0]} did not arrive as it was sent. Run the same command again")
        self.say(f"{name}: verifying {repository.size:,} bytes at {commit[:12]}")
        for file, payload in repository.files.items():
            with tempfile.TemporaryDirectory() as folder:
                found = sha256_of(self._fetch(name, commit, file, folder))
            if found != payload.sha256:
                raise PublishError(
                    f"{name}: {file} was downloaded with sha256 {found[:12]}, expected {payload.sha256[:12]}. "
                    "Run the same command again"
                )

    # Making it visible.

    def _promote(self, repository: Repository, remote: Remote, ref: str, commit: str, request: Request) -> Published:
        name = f"{request.namespace}/{repository.name}"
        uploaded = tuple(_missing(repository, remote.files))
        if request.pull_request and not request.merge:
            return Published(name, remote.head, uploaded, "waiting")
        advance = self._merge if request.pull_request else self._commit
        head = self.attempt(f"{name}: main", lambda: advance(name, repository, remote, ref, commit, request.tag))
        if _missing(repository, self.tree(name, head)):
            raise PublishError(
                f"{name}: main ({head[:12]}) does not hold what was staged. Compare it with {commit[:12]}"
            )
        self._tag(name, request.tag, head)
        if not request.pull_request:
            self.attempt(f"{name}: branch", lambda: self._drop(name, ref))
        self.say(f"{name}: {request.tag} is {head[:12]}")
        return Published(name, head, uploaded)

    def _commit(self, name: str, repository: Repository, remote: Remote, ref: str, commit: str, tag: str) -> str:
        """Move main to the release in one commit, large files by reference to the verified commit; the new head."""
        from huggingface_hub import CommitOperationCopy

        head = self.refs(name)["main"]
        files = self.tree(name, head)
        missing, stale = _missing(repository, files), [file for file in remote.stale if file in files]
        if not missing and not stale:
            return head
        self._require_head(name, head, remote)
        large = [file for file in missing if self._is_large(name, commit, file)]
        small = {file: repository.files[file] for file in missing if file not in large}
        copies = [CommitOperationCopy(src_path_in_repo=file, path_in_repo=file, src_revision=commit) for file in large]
        made = self.api.create_commit(
            name,
            [*_operations(small, stale), *copies],
            commit_message=f"Release {tag}",
            parent_commit=remote.head,
        )
        return str(made.oid)

    def _is_large(self, name: str, commit: str, file: str) -> bool:
        return len(self._tree_of(name, commit)[file]) == 64  # a sha256; git ids have 40 digits

    def _tree_of(self, name: str, commit: str) -> dict[str, str]:
        """Tree of a commit that cannot change any more; kept for the last one asked for."""
        if getattr(self, "_kept", ("", {}))[0] != name + commit:
            self._kept = (name + commit, self.tree(name, commit))
        return self._kept[1]

    def _merge(self, name: str, repository: Repository, remote: Remote, ref: str, commit: str, tag: str) -> str:
        """Merge the pull request `ref`; the new head."""
        head = self.refs(name)["main"]
        if head != remote.head and not _missing(repository, self.tree(name, head)):
            return head
        self._require_head(name, head, remote)
        number = int(ref.rsplit("/", 1)[-1])
        if self.api.get_discussion_details(name, number).status == "draft":
            self.api.change_discussion_status(name, number, "open")
        self.api.merge_pull_request(name, number)
        return self.refs(name)["main"]

    @staticmethod
    def _require_head(name: str, head: str, remote: Remote) -> None:
        if head != remote.head:
            raise PublishError(
                f"{name}: somebody moved main from {str(remote.head)[:12]} to {head[:12]} meanwhile. Look at the change, and "
                "run the same command again"
            )

    def _tag(self, name: str, tag: str, head: str) -> None:
        self.attempt(f"{name}: tag {tag}", lambda: self.api.create_tag(name, tag=tag, revision=head, exist_ok=True))

    def _drop(self, name: str, branch: str) -> None:
        from huggingface_hub.errors import RevisionNotFoundError

        try:
            self.api.delete_branch(name, branch=branch)
        except RevisionNotFoundError:
            return

    def _collect(self, repositories: Sequence[Repository], request: Request) -> None:
        title = request.collection
        if title is None:
            return

        def collect() -> None:
            found = self.api.create_collection(title, namespace=request.namespace, exists_ok=True)
            there = {item.item_id for item in found.items}
            for name in (f"{request.namespace}/{repository.name}" for repository in repositories):
                if name not in there:
                    self.api.add_collection_item(found.slug, name, "model", exists_ok=True)

        self.attempt(f"collection {title}", collect)

    def attempt(self, what: str, step: Callable[[], Result]) -> Result:
        """`step`, repeated while the server is busy or unreachable."""
        for attempt in range(ATTEMPTS):
            try:
                return step()
            except QQuantError:
                raise
            except _failures() as error:
                wait = pause(error, attempt)
                if wait is None or attempt == ATTEMPTS - 1:
                    raise
                self.say(f"{what}: {clean(str(error)).splitlines()[0]}; again in {wait:.0f} s")
                self.sleep(wait)
        raise AssertionError("unreachable")


def _failures() -> tuple[type[BaseException], ...]:
    """What the client raises when a request fails: HTTP statuses, transport errors, and its own wrapper of both."""
    from huggingface_hub.errors import HfHubHTTPError

    transport = HfHubHTTPError.__mro__[
        1
    ]  # the HTTP library's base error; which library depends on the client's version
    return (transport, OSError, RuntimeError)


def pause(error: BaseException | None, attempt: int) -> float | None:
    """Seconds to wait before attempt number `attempt` + 2; None where another attempt is no use."""
    while error is not None and getattr(error, "response", None) is None and error.__cause__ is not None:
        error = error.__cause__
    response = getattr(error, "response", None)
    if response is None:
        local = isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError) and error.errno
        return None if local else min(LONGEST_WAIT, 2.0**attempt)
    if response.status_code != 429 and response.status_code < 500:
        return None
    reset = re.search(r"\bt\s*=\s*(\d+)", response.headers.get("RateLimit", ""))
    after = reset[1] if reset else response.headers.get("Retry-After", "")
    return float(after) + 1 if after.isdigit() else min(LONGEST_WAIT, 2.0**attempt)


def clean(text: str) -> str:
    """`text` without tokens and signatures of upload addresses."""
    return SECRET.sub("***", text)


@contextmanager
def _reported(visible: Sequence[str], what: str = VISIBLE) -> Iterator[None]:
    """Turn every failure of the hub into a PublishError that says what readers see."""
    try:
        yield
    except PublishError as error:
        raise PublishError(f"{error}\n{_seen(visible, what)}") from None
    except QQuantError:
        raise
    except _failures() as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = int(getattr(getattr(cause, "response", None), "status_code", 0))
        raise PublishError(f"{clean(str(cause))}{HINTS.get(status, '')}\n{_seen(visible, what)}") from None


def _seen(visible: Sequence[str], what: str) -> str:
    if visible:
        return f"{what}: {', '.join(visible)}. The others are as they were; the same command continues."
    return f"{NOTHING[what]}; the same command continues."


def _missing(repository: Repository, there: Mapping[str, str]) -> list[str]:
    """Files of `repository` that are not, or not with these bytes, in a tree."""
    return [name for name, payload in repository.files.items() if not _same(payload, there.get(name))]


def _same(payload: Payload, oid: str | None) -> bool:
    if oid is None:
        return False
    return oid == (payload.sha256 if len(oid) == 64 else payload.git_oid())


def _operations(added: Mapping[str, Payload], removed: Sequence[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    additions = [CommitOperationAdd(name, payload.path or payload.content) for name, payload in added.items()]
    return [*additions, *(CommitOperationDelete(name) for name in removed)]


@dataclass(frozen=True)
class Setting:
    """One value of one JSON file, as `FILE:KEY=VALUE` says it; dots in KEY go into mappings, VALUE is JSON or plain text."""

    file: str
    keys: tuple[str, ...]
    value: Any

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Raise UsageError unless `text` has that form."""
        match = re.fullmatch(r"([\w.-]+\.json):([\w.-]+)=(.*)", text, re.DOTALL)
        if match is None or match[1] in (MANIFEST, REPORT):
            raise UsageError(
                f"{text!r}: must be FILE.json:KEY=VALUE, such as generation_config.json:pad_token_id=151643"
            )
        try:
            value = json.loads(match[3])
        except ValueError:
            value = match[3]
        return cls(match[1], tuple(match[2].split(".")), value)

    def apply(self, content: bytes, where: str) -> bytes:
        """The file with this value; the very same bytes if it has it already."""
        try:
            document = json.loads(content)
        except ValueError:
            raise PublishError(f"{where}: {self.file} is not valid JSON. Nothing was changed in it") from None
        place = document
        for key in self.keys[:-1]:
            place = place.get(key) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise PublishError(
                f"{where}: {self.file} has no mapping {'.'.join(self.keys[:-1])}. Nothing was changed in it"
            )
        last = self.keys[-1]
        if last in place and place[last] == self.value and type(place[last]) is type(self.value):
            return content
        place[last] = self.value
        end = b"\n" if content.endswith(b"\n") else b""
        return json.dumps(document, indent=2, ensure_ascii=False).encode() + end


@dataclass(frozen=True)
class Change:
    """What a setting changes in one repository."""

    repository: str
    diff: str  # empty: nothing
    commit: str | None = None


def patch(
    client: HuggingFace, setting: Setting, patterns: Sequence[str], show: Callable[[Change], bool]
) -> list[Change]:
    """Change one setting in every repository that a pattern (ORG/NAME with * and ?) matches; one commit each.

    All changes are computed before the first is made; `show` sees each one and says whether to make it. The manifest's hash of the
    file changes in the same commit, so that `qquant verify` still holds. What already has the value is left alone.

    Raises:
        PublishError: a repository lacks the file or cannot be changed; the message says which ones were.
    """
    done: list[str] = []
    with _reported(done, CHANGED):
        names = _matching(client, patterns)
        if not names:
            raise UsageError(f"{', '.join(patterns)}: matches no repository")
        planned = [(name, *_patched(client, name, setting)) for name in names]
        changes = []
        for name, head, files, diff in planned:
            change = Change(name, diff)
            if show(change) and diff:
                change = Change(name, diff, _commit_patch(client, name, head, files, setting))
                done.append(name)
            changes.append(change)
    return changes


def _matching(client: HuggingFace, patterns: Sequence[str]) -> list[str]:
    owners = dict.fromkeys(pattern.split("/")[0] for pattern in patterns)
    if any("/" not in pattern for pattern in patterns) or any(set("*?[") & set(owner) for owner in owners):
        raise UsageError("--repos: must be OWNER/PATTERN; the owner is a name")
    found: list[str] = []
    for owner in owners:
        listed = client.attempt(f"{owner}: repositories", partial(_models, client, owner))
        found += [info.id for info in listed]
    return sorted(name for name in found if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _models(client: HuggingFace, owner: str) -> list[Any]:
    return list(client.api.list_models(author=owner))


def _patched(client: HuggingFace, name: str, setting: Setting) -> tuple[str, dict[str, bytes], str]:
    """(head, new contents by file, unified diff) of one repository."""
    head = client.refs(name)["main"]
    there = client.tree(name, head)
    if setting.file not in there:
        raise PublishError(f"{name}: has no {setting.file}")
    old = client.download(name, head, setting.file)
    new = setting.apply(old, name)
    if new == old:
        return head, {}, ""
    files = {setting.file: new}
    if MANIFEST in there:
        files[MANIFEST] = _patched_manifest(json.loads(client.download(name, head, MANIFEST)), setting, new)
    lines = difflib.unified_diff(
        old.decode().splitlines(),
        new.decode().splitlines(),
        f"{name}/{setting.file}",
        f"{name}/{setting.file}",
        lineterm="",
    )
    return head, files, "\n".join(lines)


def _patched_manifest(manifest: dict[str, Any], setting: Setting, content: bytes) -> bytes:
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    for entry in manifest["artifacts"].values():
        if setting.file in entry["files"]:
            entry["files"][setting.file] = facts
    manifest.setdefault("patches", []).append(
        {"file": setting.file, "key": ".".join(setting.keys), "value": setting.value, **facts}
    )
    return as_json(manifest)


def _commit_patch(client: HuggingFace, name: str, head: str, files: Mapping[str, bytes], setting: Setting) -> str:
    payloads = {file: Payload.of(content) for file, content in files.items()}

    def send() -> str:
        now = client.refs(name)["main"]
        tree = client.tree(name, now)
        if all(_same(payload, tree.get(file)) for file, payload in payloads.items()):
            return now
        made = client.api.create_commit(
            name,
            _operations(payloads, ()),
            commit_message=f"Set {'.'.join(setting.keys)} in {setting.file}",
            parent_commit=head,
        )
        return str(made.oid)

    return client.attempt(f"{name}: commit", send)


class Folder:
    """A local folder with one folder per repository."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def publish(self, repositories: Sequence[Repository], request: Request) -> list[Published]:
        """See `Destination`; each folder appears by one rename."""
        done = []
        for repository in repositories:
            final = self.root / repository.name
            if final.exists():
                self._require_same(final, repository)
                done.append(Published(str(final), None, (), "unchanged"))
            elif request.dry_run:
                done.append(Published(str(final), None, tuple(repository.files), "planned"))
            else:
                self._write(final, repository)
                done.append(Published(str(final), None, tuple(repository.files)))
        return done

    def _write(self, final: Path, repository: Repository) -> None:
        partial = final.with_name(f".{final.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for name, payload in repository.files.items():
                target = partial / name
                target.parent.mkdir(parents=True, exist_ok=True)
                if payload.path:
                    shutil.copyfile(payload.path, target)
                else:
                    target.write_bytes(payload.content)
                if sha256_of(target) != payload.sha256:
                    raise PublishError(f"{target}: was written with other bytes than {name} has; check the disk")
                with target.open("rb") as file:
                    os.fsync(file.fileno())
            partial.rename(final)
        except OSError as error:
            raise EnvironmentMissingError(
                f"{error.filename or final}: {error.strerror}. Nothing of it is visible"
            ) from None

    @staticmethod
    def _require_same(final: Path, repository: Repository) -> None:
        for name, payload in repository.files.items():
            path = final / name
            if not path.is_file() or path.stat().st_size != payload.size or sha256_of(path) != payload.sha256:
                raise UsageError(f"{path}: exists and is not of this release. Choose another --out, or move it away")


class ModelScope:
    """modelscope.cn through its own client. The order of uploads makes a half-done one unloadable instead of invisible."""

    def __init__(self, api: Any, say: Say) -> None:
        self.api = api
        self.say = say

    @classmethod
    def connect(cls, say: Say) -> ModelScope:
        """The client of the `modelscope` package, with the token that it finds (MODELSCOPE_API_TOKEN, `modelscope login`).

        Raises:
            EnvironmentMissingError: the package is not installed.
        """
        try:
            from modelscope.hub.api import HubApi  # type: ignore[import-not-found]  # the extra
        except ImportError:
            raise EnvironmentMissingError(
                "--to modelscope needs the modelscope client: pip install 'qquant[modelscope]'"
            ) from None
        return cls(HubApi(), say)

    def publish(self, repositories: Sequence[Repository], request: Request) -> list[Published]:
        """See `Destination`; pull requests and tags do not exist there."""
        if request.pull_request:
            raise UsageError("--pr: ModelScope has no pull requests for models. Leave it out")
        done = []
        for repository in repositories:
            name = f"{request.namespace}/{repository.name}"
            if request.dry_run:
                done.append(Published(name, None, tuple(repository.files), "planned"))
                continue
            self._send(name, repository, request)
            done.append(Published(name, None, tuple(repository.files)))
        return done

    def _send(self, name: str, repository: Repository, request: Request) -> None:
        with tempfile.TemporaryDirectory() as root:
            folder = Folder(Path(root))
            folder.publish([repository], request)
            place = Path(root) / repository.name
            heads = [file for file in ("config.json", MANIFEST) if file in repository.files]
            try:
                self.api.create_repo(name, visibility="private" if request.private else "public", exist_ok=True)
                self.say(f"{name}: uploading {repository.size:,} bytes")
                self.api.upload_folder(
                    repo_id=name, folder_path=place, commit_message=f"Stage {request.tag}", ignore_patterns=heads
                )
                self.api.upload_folder(
                    repo_id=name, folder_path=place, commit_message=f"Release {request.tag}", allow_patterns=heads
                )
            except (OSError, RuntimeError, ValueError) as error:
                raise PublishError(
                    f"{name}: {clean(str(error))}\nWithout its config and manifest it is not loadable; run the same command again"
                ) from None


def destination(kind: str, out: Path | None, endpoint: str | None, say: Say) -> Destination:
    """The destination of that name: "hf", "modelscope" or "dir" (below `out`)."""
    match kind:
        case "dir" if out is not None:
            return Folder(out)
        case "modelscope":
            return ModelScope.connect(say)
    return HuggingFace.connect(endpoint, say)
