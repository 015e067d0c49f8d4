"""ModelScope, through its own client (extra `modelscope`): no branches that a merge could move at once.

So the weights go first, and the files that make a reader load them last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qquant.disk.output import MANIFEST
from qquant.errors import EnvironmentMissingError, PublishError, UsageError
from qquant.release.hub.failures import clean
from qquant.release.hub.folder import Folder
from qquant.release.hub.request import Published, Request, Say
from qquant.release.repository import Repository


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
            staged = Path(root) / repository.name
            heads = [file for file in ("config.json", MANIFEST) if file in repository.files]
            try:
                self.api.create_repo(name, visibility="private" if request.private else "public", exist_ok=True)
                self.say(f"{name}: uploading {repository.size:,} bytes")
                self.api.upload_folder(
                    repo_id=name, folder_path=staged, commit_message=f"Stage {request.tag}", ignore_patterns=heads
                )
                self.api.upload_folder(
                    repo_id=name, folder_path=staged, commit_message=f"Release {request.tag}", allow_patterns=heads
                )
            except (OSError, RuntimeError, ValueError) as error:
                raise PublishError(
                    f"{name}: {clean(str(error))}\nWithout its config and manifest it is not loadable; run the same command again"
                ) from None
