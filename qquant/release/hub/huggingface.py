"""The Hugging Face hub: a release becomes visible whole or not at all.

    every repository:   look (refs, tree)  ->  stage on a branch or a pull request  ->  download what was staged, hash it
    then, one by one:   one commit to main with `parent_commit`  ->  tag  ->  drop the branch
    then:               the collection

`main` moves in one commit per repository, from the staged and verified bytes, and only if nobody else moved it since we looked.
No repository moves before every one is staged and verified. Large files are staged one commit each, so a rerun after a kill
uploads at most the file that was under way. A tag is never moved: the same release again changes nothing, another release under
the same tag is refused. Every step looks before it acts, so it can be repeated after a lost answer: 429 and 5xx wait as long as
the server says (RateLimit, Retry-After), else 1, 2, 4 ... 60 s.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qquant.artifact.manifest import Manifest, named_files
from qquant.disk.digest import sha256_of
from qquant.disk.output import MANIFEST
from qquant.errors import InputError, PublishError
from qquant.release.hub.failures import Result, repeated, reported, require_answer
from qquant.release.hub.request import Published, Request, Say
from qquant.release.hub.trees import lacking, operations
from qquant.release.repository import Repository
from qquant.source.untrusted import parse_json

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LARGE = 10 << 20  # bytes; such files are staged in a commit of their own
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".safetensors.index.json")


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
        api = HfApi(endpoint)
        require_answer(api.endpoint)
        return cls(api, say)

    def publish(self, repositories: Sequence[Repository], request: Request) -> list[Published]:
        """See `Destination`."""
        visible: list[str] = []
        with reported(visible):
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

    def manifest(self, name: str, revision: str) -> Manifest:
        """The manifest of a repository. Raises InputError if it is malformed."""
        where = f"{name}/{MANIFEST}"
        try:
            content = parse_json(self.download(name, revision, MANIFEST))
        except ValueError as error:
            raise InputError(f"{where}: not valid JSON: {error}") from None
        return Manifest.from_json(content if isinstance(content, dict) else {}, where)

    def _stale(self, name: str, remote: Remote, repository: Repository) -> tuple[str, ...]:
        """Files of the release that main shows now which the new one does not have.

        Raises PublishError if main holds weights that are in no manifest: readers would load a mixture.
        """
        ours: set[str] = set()
        if MANIFEST in remote.files and remote.head:
            ours = named_files([self.manifest(name, remote.head)])
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
        if lacking(repository, self.tree(name, commit)):
            raise PublishError(
                f"{name}: tag {request.tag} marks another release ({commit[:12]}), and tags are never moved. Give a new --tag"
            )
        return True

    def _unchanged(self, repository: Repository, remote: Remote, request: Request) -> Published:
        return Published(f"{request.namespace}/{repository.name}", remote.tags[request.tag], (), "unchanged")

    def _planned(self, repository: Repository, remote: Remote, request: Request) -> Published:
        missing = lacking(repository, remote.files)
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
            for discussion in self.api.get_repo_discussions(
                name, discussion_type="pull_request", discussion_status="open"
            ):
                if discussion.title == title:
                    return discussion.num
            return self.api.create_pull_request(name, title=title, description="Staged by `qquant publish`.").num

        return f"refs/pr/{self.attempt(f'{name}: pull request', open_one)}"

    def _upload(self, name: str, ref: str, repository: Repository, tag: str, stale: Sequence[str]) -> None:
        """Bring `ref` to the files of `repository`: each large file in its own commit, then all others in one."""
        there = self.tree(name, ref)
        missing = lacking(repository, there)
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
                added = {file: repository.files[file] for file in lacking(repository, files) if file in batch}
                left = [file for file in removed if file in files]
                if added or left:
                    self.api.create_commit(
                        name, operations(added, left), commit_message=f"Stage {tag}", revision=ref, num_threads=2
                    )

            self.attempt(f"{name}: upload", send)

    def _verify(self, name: str, commit: str, repository: Repository) -> None:
        """Download every file of the staged commit and compare its sha256.

        Raises:
            PublishError: one is missing or differs.
        """
        missing = lacking(repository, self.tree(name, commit))
        if missing:
            raise PublishError(f"{name}: {missing[0]} did not arrive as it was sent. Run the same command again")
        self.say(f"{name}: verifying {repository.size:,} bytes at {commit[:12]}")
        for file, payload in repository.files.items():
            with tempfile.TemporaryDirectory() as folder:
                digest = sha256_of(self._fetch(name, commit, file, folder))
            if digest != payload.sha256:
                raise PublishError(
                    f"{name}: {file} was downloaded with sha256 {digest[:12]}, expected {payload.sha256[:12]}. "
                    "Run the same command again"
                )

    # Making it visible.

    def _promote(self, repository: Repository, remote: Remote, ref: str, commit: str, request: Request) -> Published:
        name = f"{request.namespace}/{repository.name}"
        uploaded = tuple(lacking(repository, remote.files))
        if request.pull_request and not request.merge:
            return Published(name, remote.head, uploaded, "waiting")
        advance = self._merge if request.pull_request else self._commit
        head = self.attempt(f"{name}: main", lambda: advance(name, repository, remote, ref, commit, request.tag))
        if lacking(repository, self.tree(name, head)):
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
        missing, stale = lacking(repository, files), [file for file in remote.stale if file in files]
        if not missing and not stale:
            return head
        self._require_head(name, head, remote)
        large = [file for file in missing if self._is_large(name, commit, file)]
        small = {file: repository.files[file] for file in missing if file not in large}
        copies = [CommitOperationCopy(src_path_in_repo=file, path_in_repo=file, src_revision=commit) for file in large]
        made = self.api.create_commit(
            name, [*operations(small, stale), *copies], commit_message=f"Release {tag}", parent_commit=remote.head
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
        if head != remote.head and not lacking(repository, self.tree(name, head)):
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
            collection = self.api.create_collection(title, namespace=request.namespace, exists_ok=True)
            there = {item.item_id for item in collection.items}
            for name in (f"{request.namespace}/{repository.name}" for repository in repositories):
                if name not in there:
                    self.api.add_collection_item(collection.slug, name, "model", exists_ok=True)

        self.attempt(f"collection {title}", collect)

    def attempt(self, what: str, step: Callable[[], Result]) -> Result:
        """`step`, repeated while the server is busy or unreachable."""
        return repeated(what, step, self.say, self.sleep)
