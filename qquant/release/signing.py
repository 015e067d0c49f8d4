"""The OpenSSF model signature over a release folder (extra `sign`): made here, put beside the files that are published."""

from __future__ import annotations

import errno
from pathlib import Path

from qquant.artifact.manifest import SIGNATURE, verify_files
from qquant.disk.digest import is_file_of
from qquant.disk.writes import rename, sync
from qquant.errors import EnvironmentMissingError, InputError
from qquant.release.repository import Repository

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def with_signature(repository: Repository, signed: Path) -> Repository:
    """The repository with the signature that `sign` left in its folder below `signed`; every file there is compared first.

    Raises:
        InputError: there is none, or it was made over other files.
    """
    folder = signed / repository.name
    if not (folder / SIGNATURE).is_file():
        raise InputError(f"{folder / SIGNATURE}: not found. Make it with `qquant publish --to dir`, then `qquant sign`")
    for name, payload in repository.files.items():
        path = folder / name
        if not is_file_of(path, payload.size, payload.sha256):
            raise InputError(
                f"{path}: is not what would be published, so the signature would not hold. Make the folder with the same "
                "--namespace, --tag and --base-model, and sign it again"
            )
    return repository.with_files({SIGNATURE: (folder / SIGNATURE).read_bytes()})


def sign(folder: Path, key: Path | None = None) -> Path:
    """Sign a release folder as the OpenSSF model signing specification says: with a private key, or keyless through Sigstore.

    Raises:
        EnvironmentMissingError: the `model-signing` package is not installed, or the signature cannot be written.
        InputError: the folder is not as its manifest says, or the key cannot be used.
    """
    try:
        from model_signing import hashing, signing  # type: ignore[import-not-found]  # the extra
    except ImportError:
        raise EnvironmentMissingError("sign needs the model-signing package: pip install 'qquant[sign]'") from None
    verify_files(folder)
    target, partial = folder / SIGNATURE, folder.parent / f".{folder.name}.{SIGNATURE}.partial"
    config = signing.Config().set_hashing_config(hashing.Config().set_ignored_paths(paths=[target]))
    try:
        if key:
            config.use_elliptic_key_signer(private_key=key)
        else:
            config.use_sigstore_signer(use_ambient_credentials=True)
        config.sign(folder, partial)  # beside the folder: half a signature is never in it, nor signed over
        sync(partial)
        rename(partial, target)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise EnvironmentMissingError(f"{target}: {error.strerror}. Sign it again") from None
        raise InputError(f"{key or folder}: cannot sign: {error}") from None
    return target
