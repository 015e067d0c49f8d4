"""A local folder as the destination of a release: one folder per repository, each appearing by one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from qquant.disk.digest import is_file_of, sha256_of
from qquant.disk.writes import rename, sync
from qquant.errors import EnvironmentMissingError, PublishError, UsageError
from qquant.release.hub.request import Published, Request
from qquant.release.repository import Repository


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
            for folder in {(partial / name).parent for name in repository.files}:
                sync(folder)
            rename(partial, final)
        except OSError as error:
            raise EnvironmentMissingError(
                f"{error.filename or final}: {error.strerror}. Nothing of it is visible"
            ) from None

    @staticmethod
    def _require_same(final: Path, repository: Repository) -> None:
        for name, payload in repository.files.items():
            path = final / name
            if not is_file_of(path, payload.size, payload.sha256):
                raise UsageError(f"{path}: exists and is not of this release. Choose another --out, or move it away")
