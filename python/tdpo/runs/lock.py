"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "_lock"  # uploads to a hub skip names that begin so
_held: set[tuple[int, Path]] = set()  # processes, which a fork copies, and the folders that they hold


@contextlib.contextmanager
def only_run_in(output_dir: str | Path) -> Iterator[None]:
    """A context in which no other run may enter the same one; within a process it may be entered again.

    The main process of a run holds the lock of a file, which ends with the process, however that ends. A file system
    that has no locks refuses nobody.

    Raises:
        ValueError: another run is in it, which the message names; all processes raise it.
    """
    problem: list[str | None] = [None]
    with contextlib.ExitStack() as stack:
        if PartialState().is_main_process:
            try:
                stack.enter_context(_held_folder(Path(output_dir)))
            except ValueError as error:
                problem[0] = str(error)
        (sentence,) = broadcast_object_list(problem)
        if sentence is not None:
            raise ValueError(sentence)
        yield


@contextlib.contextmanager
def _held_folder(folder: Path) -> Iterator[None]:
    holding = (os.getpid(), folder.resolve())
    descriptor = None if holding in _held else _lock(folder / LOCK)
    if descriptor is None:
        yield
        return
    _held.add(holding)
    try:
        yield
    finally:
        _held.remove(holding)
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """A locked file's descriptor; None where none can be locked.

    The lock is of this process alone, not of those that it forks: one of them may live on when it is killed.

    Raises:
        ValueError: another process has locked it.
    """
    if fcntl is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:  # a folder that can't be written in is named by the first that has to
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
        os.close(descriptor)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        raise ValueError(
            f"output_dir is {path.parent}, in which {holder} is training: wait until it ends, or give another one"
        ) from None
    if not _is_still(path, descriptor):  # whoever had locked it has removed it meanwhile
        os.close(descriptor)
        return _lock(path)
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
