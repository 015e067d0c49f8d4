"""`--allow-pickle`: a checkpoint of pickled .bin files, converted once into safetensors beside the output.

    .OUT.converted/<sha256 of the sources>/<model>/    the converted files, copies of the small ones, and converted.json:
                                                       sha256 of every source and of every file; checked before it is used again

Before anything is loaded, each file must be a zip as torch.save writes it (stored, not compressed), and its pickle may name no other
globals than those of tensors (an allow-list, read without running anything). Then `confined_child` loads it, in a process without a
network and with limits. The inputs are not changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickletools
import shutil
import subprocess
import zipfile
from pathlib import Path

from qquant.disk.digest import sha256_of
from qquant.disk.writes import make_folder, rename, sync, write_synced
from qquant.errors import InputError
from qquant.source import confined
from qquant.source.checkpoint import CONFIGS, SIDE_FILES, read_config
from qquant.source.safetensors_file import read_header
from qquant.source.untrusted import NAME_LIMIT, PLAIN_NAME, read_json, require_regular

INDEX = "pytorch_model.bin.index.json"
RECORD = "converted.json"
PICKLE_LIMIT = 25_000_000  # bytes of data.pkl
ENTRY_LIMIT = 200_000
SECONDS, BYTES_A_SECOND = 600, 5_000_000
STORAGES = (
    "BFloat16Storage",
    "HalfStorage",
    "FloatStorage",
    "DoubleStorage",
    "LongStorage",
    "IntStorage",
    "ByteStorage",
)
GLOBALS = {f"torch {name}" for name in STORAGES} | {
    "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter", "collections OrderedDict",
}  # fmt: skip
REFUSED = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")  # other ways to name a class


def sources(path: Path) -> list[Path]:
    """The pickled files of a checkpoint folder that has no safetensors; [] if there are none.

    Raises:
        InputError: the index is malformed or names a file elsewhere.
    """
    if not path.is_dir() or list(path.glob("*.safetensors*")):
        return []
    if os.path.lexists(path / INDEX):
        weights = read_json(path / INDEX).get("weight_map")
        names = set(weights.values()) if isinstance(weights, dict) else {None}
        for name in names:
            if (
                not isinstance(name, str)
                or len(name) > NAME_LIMIT
                or not PLAIN_NAME.fullmatch(name)
                or not name.endswith(".bin")
            ):
                raise InputError(f"{path / INDEX}: {str(name)[:80]!r} is not the plain name of a .bin file")
        return [require_regular(path / str(name)) for name in sorted(map(str, names))]
    single = path / "pytorch_model.bin"
    return [require_regular(single)] if os.path.lexists(single) else []


def converted(path: Path, out: Path) -> Path:
    """The folder `path` with its pickles converted, in the cache beside `out`; `path` itself where it has none.

    Raises:
        InputError: a file is no state dict, or its loading does what it should not.
    """
    files = sources(path)
    if not files:
        return path
    read_config(path)
    hashes = {file.name: sha256_of(file) for file in files}
    key = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]
    target = out.absolute().parent / f".{out.absolute().name}.converted" / key / path.resolve().name
    if _valid(target, hashes):
        return target
    for file in files:
        require_state_dict(file)
    work = target.with_name(f".{target.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    make_folder(work)
    weights: dict[str, str] = {}
    for file in files:
        made = work / f"{file.stem}.safetensors"
        _convert(file, made)
        weights |= dict.fromkeys(read_header(made)[0], made.name)
        sync(made)
    if len(files) > 1:
        index = {"metadata": {}, "weight_map": dict(sorted(weights.items()))}
        write_synced(work / "model.safetensors.index.json", json.dumps(index).encode())
    for name in ("config.json", "README.md", *CONFIGS, *SIDE_FILES):
        if os.path.lexists(path / name):
            write_synced(work / name, require_regular(path / name).read_bytes())
    made_hashes = {file.name: sha256_of(file) for file in sorted(work.iterdir())}
    write_synced(work / RECORD, json.dumps({"sources": hashes, "files": made_hashes}).encode())
    rename(work, target)
    return target


def _valid(target: Path, hashes: dict[str, str]) -> bool:
    if not (target / RECORD).is_file():
        return False
    record = read_json(target / RECORD)
    files = record.get("files")
    return (
        record.get("sources") == hashes
        and isinstance(files, dict)
        and all((target / name).is_file() and sha256_of(target / name) == value for name, value in files.items())
    )


def require_state_dict(file: Path) -> None:
    """Raise InputError unless `file` is a stored zip whose pickle names nothing but tensors; nothing is loaded."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            pickled = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            plain = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            if len(entries) > ENTRY_LIMIT or len(pickled) != 1 or not plain:
                raise InputError(f"{file}: is not a zip as torch.save writes it")
            if pickled[0].file_size > PICKLE_LIMIT or sum(entry.file_size for entry in entries) > file.stat().st_size:
                raise InputError(f"{file}: its entries are larger than a state dict's")
            content = archive.read(pickled[0])
        for opcode, argument, _ in pickletools.genops(content):
            named = opcode.name == "GLOBAL" and argument not in GLOBALS
            if named or opcode.name in REFUSED:
                raise InputError(
                    f"{file}: its pickle asks for {opcode.name} {str(argument or '')[:80]}; that is no tensor"
                )
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError, RuntimeError) as error:
        raise InputError(f"{file}: is not a zip as torch.save writes it ({error})") from None


def _convert(file: Path, target: Path) -> None:
    limit = SECONDS + file.stat().st_size / BYTES_A_SECOND
    command = confined.command("pickle", str(file.absolute()), str(target.absolute()))
    try:
        done = subprocess.run(
            command, env=confined.environment(), capture_output=True, timeout=limit, check=False, cwd="/"
        )
    except subprocess.TimeoutExpired:
        raise InputError(f"{file}: is not converted after {limit:.0f} s") from None
    if done.returncode or not target.is_file():
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise InputError(f"{file}: cannot be converted: {said[-1][:300] if said else f'status {done.returncode}'}")
