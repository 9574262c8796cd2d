"""Files that appear complete or not at all, and that show when they are damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SEAL = "digest"  # the key under which a sealed JSON file holds the digest of its other keys
MANIFEST = "manifest.json"  # sizes and digests of all other files of a folder, written last
_BLOCK = 2**20  # bytes read or written at a time
_NO_FALLOCATE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def digest(*parts: Any) -> str:
    """The 128-bit BLAKE2b digest of bytes or contiguous buffers, in hexadecimal."""
    return stream_digest(parts)


def stream_digest(parts: Iterable[Any]) -> str:
    """The digest of bytes or buffers that need not be in memory together."""
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


def file_digest(path: Path) -> str:
    """The digest of a file's content."""
    with open(path, "rb") as file:
        return stream_digest(iter(lambda: file.read(_BLOCK), b""))


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically, replacing what was at `path`."""
    partial = path.with_suffix(".part")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, replacing what was at `path`."""
    write_bytes(path, json.dumps(content, indent=1).encode())


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: the file holds no JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # invalid JSON or encoding
        raise ValueError(f"{path} is damaged: it is not valid JSON ({error})") from error


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object atomically, with a digest of its content in it."""
    write_json(path, {**content, _SEAL: _seal(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The object that `write_sealed` wrote.

    Raises:
        ValueError: it was changed since; the message names the file.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.pop(_SEAL, None) != _seal(content):
        raise ValueError(f"{path} is damaged, or of another version: its content does not match its digest")
    return content


def _seal(content: dict[str, Any]) -> str:
    return digest(json.dumps(content, sort_keys=True).encode())


def allocate(path: Path, size: int) -> None:
    """Creates a file of `size` zero bytes, its space reserved: a later write through a mapping can't run out of disk.

    Raises:
        OSError: the disk can't hold it. What was allocated is freed.
    """
    try:
        with open(path, "wb") as file:
            if not _fallocate(file.fileno(), size):
                for first in range(0, size, _BLOCK):
                    file.write(bytes(min(_BLOCK, size - first)))
                file.flush()
                os.fsync(file.fileno())  # some file systems reserve space only when the data reach them
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, f"{error.strerror}: {size:,} bytes are needed", str(path)) from error


def _fallocate(descriptor: int, size: int) -> bool:
    """Reserves space for a file; False where the system or the file system can't."""
    reserve: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)  # macOS has none
    if reserve is None or size == 0:
        return False
    try:
        reserve(descriptor, 0, size)
    except OSError as error:
        if error.errno in _NO_FALLOCATE:
            return False
        raise
    return True


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to write in, which takes the place of the folder `path` once all is written."""
    written = path.with_name(f"_{path.name}-being-written")
    shutil.rmtree(written, ignore_errors=True)  # left behind by a process that was killed while writing
    yield written
    shutil.rmtree(path, ignore_errors=True)
    written.rename(path)


def save_model(path: Path, model: Any, tokenizer: Any) -> None:
    """Saves a model and its tokenizer atomically in the folder `path`."""
    with whole_folder(path) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def write_manifest(folder: Path, only_model: bool) -> None:
    """Seals a checkpoint: lists its files; `only_model` says that it holds no optimizer."""
    paths = {name: folder / name for name in _files(folder)}
    files = {name: (path.stat().st_size, file_digest(path)) for name, path in paths.items()}
    write_sealed(folder / MANIFEST, {"only_model": only_model, "files": files})


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The content of a manifest, `only_model` and `files`.

    Raises:
        ValueError: it is missing or damaged; the message names it.
    """
    path = Path(folder, MANIFEST)
    if not path.is_file():
        raise ValueError(f"{path} is missing: the checkpoint is not complete, or not of this trainer")
    return read_sealed(path)


def check_manifest(folder: str | Path) -> None:
    """Compares the files of a checkpoint with its manifest.

    Raises:
        ValueError: a file is missing, damaged or not listed; the message names it.
    """
    folder = Path(folder)
    listed = read_manifest(folder)["files"]
    for name, (size, expected) in listed.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != size or file_digest(path) != expected:
            raise ValueError(f"{path} is damaged: it does not match {MANIFEST}")
    unknown = sorted(set(_files(folder)) - set(listed))
    if unknown:  # a loader might prefer an unlisted file
        raise ValueError(f"{folder / unknown[0]} does not belong to the checkpoint: it is not in {MANIFEST}")


def _files(folder: Path) -> list[str]:
    """The files of a folder but its manifest, relative to it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.as_posix() for path in paths if path.as_posix() != MANIFEST)
