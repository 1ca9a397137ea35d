"""Atomic writing: files and folders appear at their place only when complete.

Content is written under a random name beside the destination, flushed to the disk and renamed. A killed run leaves that
name behind; the next one on this machine that writes into the same folder removes it, another machine, which may not
see that it is locked, when it is a day old. This module does not import torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import CheckpointError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_user = getattr(os, "getuid", lambda: 0)  # Windows has no user ids
_PREFIX = ".unipic.partial-"
_PARTIAL = re.compile(rf"{re.escape(_PREFIX)}[0-9a-f]{{32}}(\.\w+)?")
_TRIES = 100
_ABANDONED = 24 * 3600
"""Age in seconds at which a leftover is removed where no lock shows if its writer is alive: that of another machine, on
a folder that several share, and on systems without locks."""


def _this_system() -> str:
    """8 hexadecimal digits of the running system, within which locks are seen, containers included."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:  # no Linux
        name = platform.node()
    return hashlib.sha256(name.encode()).hexdigest()[:8]


SYSTEM = _this_system()


class AppearedError(CheckpointError):
    """Something appeared at the destination of a new file or folder while it was written, and stays."""


def require_new(dst: Path, overwrite: bool) -> None:
    """Raise CheckpointError if `dst` exists and may not be overwritten."""
    _finish_interrupted(dst)
    if os.path.lexists(dst) and not overwrite:
        raise CheckpointError(f"{dst} already exists; choose another name, or overwrite it with overwrite=True")


def write_json(path: Path, content: object, indent: int | None = 2) -> None:
    """Write JSON and a final line break; an older file is replaced when the new one is complete."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


@contextmanager
def write_errors(path: Path, size: int) -> Iterator[None]:
    """Turn OSErrors into CheckpointErrors of one sentence. size: bytes to be written."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(_full(path, size, shutil.disk_usage(path.parent).free)) from error
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def replacing(
    path: Path,
    size: int = 0,
    *,
    folder: bool = False,
    overwrite: bool = True,
    check: Callable[[], None] | None = None,
) -> Iterator[Path]:
    """Yield a temporary file or folder beside `path`, with `path`'s ending; rename it to `path` at the end.

    size: bytes to be written, checked against the free space. On any failure the temporary is removed and an older file
    or folder at `path` stays. The new file gets the older one's mode; if `path` is a link, its target is replaced.

    overwrite: False = raise CheckpointError if there is anything at `path`, AppearedError if it appears before the end.
    check: with `overwrite`, called just before `path` is replaced; may raise to keep it. Raises CheckpointError if
    `path` is a device, a broken link, or a folder where a file is expected.
    """
    path = _destination(path, folder)
    require_new(path, overwrite)
    remove_leftovers(path.parent)
    free = shutil.disk_usage(path.parent).free
    if free < size:
        raise CheckpointError(_full(path, size, free))
    partial, lock = _new_partial(path, folder)
    try:
        yield partial
        if path.exists():
            os.chmod(partial, stat.S_IMODE(path.stat().st_mode))
        _flush(partial)
        if not overwrite:
            _put_new(partial, path)
        else:
            if check is not None:
                check()
            _put_in_place(partial, path)
        _flush_folder(path.parent)
    finally:
        if lock is not None:
            os.close(lock)
        _remove(partial)


def _destination(path: Path, folder: bool) -> Path:
    """Resolve the file or folder to replace, links followed. Raises CheckpointError."""
    if not path.parent.is_dir():
        raise CheckpointError(f"there is no folder {path.parent}; create it first")
    if path.is_symlink():
        if not path.exists():
            raise CheckpointError(f"{path} is a link that leads nowhere; remove it or choose another name")
        path = path.resolve()
    if path.is_dir() and not folder:
        raise CheckpointError(f"{path} is a folder; name a file in it")
    if path.is_file() and folder:
        raise CheckpointError(f"{path} is a file; name a folder, or a file that ends in .safetensors")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is a device or a pipe, not a file; choose another name")
    return path


def _new_partial(path: Path, folder: bool) -> tuple[Path, int | None]:
    """Create a file or folder with an unguessable name: (path, descriptor that holds its lock)."""
    for _ in range(_TRIES):
        partial = path.with_name(f"{_PREFIX}{SYSTEM}{secrets.token_hex(12)}{'' if folder else path.suffix[:20]}")
        if not _PARTIAL.fullmatch(partial.name):  # the suffix is no file ending, such as ". 1"
            partial = partial.with_name(partial.name[: -len(path.suffix[:20])])
        if folder:
            partial.mkdir()
        else:
            os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            descriptor = lock(partial)
        except (BlockingIOError, FileNotFoundError):  # another run took it for a leftover before it was locked
            continue
        if partial.exists():
            return partial, descriptor
        if descriptor is not None:
            os.close(descriptor)
    raise CheckpointError(f"cannot lock a new file in {path.parent}, which others lock at once; choose another disk")


def lock(path: Path) -> int | None:
    """Lock a file or folder, not through a link: the descriptor that holds the lock; None on systems and disks without
    locks.

    Raises BlockingIOError while another process holds it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _locked(path: Path) -> int | None:
    """`lock`, with None also if another process holds it."""
    try:
        return lock(path)
    except BlockingIOError:
        return None


def remove_leftovers(folder: Path) -> None:
    """Remove the partial files and folders of killed runs from a folder."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in [e for e in entries if _PARTIAL.fullmatch(e.name)]:
            with suppress(OSError):
                _remove_leftover(Path(entry.path))


def _remove_leftover(path: Path) -> None:
    about = path.lstat()
    if not (stat.S_ISREG(about.st_mode) or stat.S_ISDIR(about.st_mode)):
        return
    if fcntl is None or not path.name.startswith(f"{_PREFIX}{SYSTEM}"):
        if time.time() - about.st_mtime > _ABANDONED:
            _remove(path)
    elif about.st_uid == _user() and (lock := _locked(path)) is not None:
        try:
            _remove(path)
        finally:
            os.close(lock)


def _put_new(partial: Path, path: Path) -> None:
    """Rename to a destination that must not exist. Raises AppearedError."""
    try:
        if partial.is_dir():
            if os.path.lexists(path):
                raise FileExistsError
            os.rename(partial, path)  # refuses files and folders with content
        else:
            _link(partial, path)
    except OSError as error:
        if not os.path.lexists(path):
            raise
        raise AppearedError(
            f"{path} appeared while this was written, so it stays and nothing was written; choose another name, or "
            "overwrite it with overwrite=True"
        ) from error


def _link(partial: Path, path: Path) -> None:
    """Give a file a second name, which must not exist, or, on disks without hard links, a new name."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(partial, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename to the destination; a folder cannot be renamed over another, so the older one is renamed first.

    Raises OSError if the older one is a folder and the new one a file, or the reverse.
    """
    if not (partial.is_dir() and path.is_dir()):
        os.replace(partial, path)
        return
    older = path.with_name(f"{_replaced_prefix(path)}{secrets.token_hex(16)}")
    try:
        os.replace(path, older)
        os.replace(partial, path)
    except BaseException:
        if older.exists() and not path.exists():
            os.replace(older, path)
        raise
    _remove(older)


def _replaced_prefix(path: Path) -> str:
    """Prefix of the temporary names of older folders with this name."""
    return f".unipic.replaced-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def _finish_interrupted(path: Path) -> None:
    """Recover from a kill between the two renames of a folder: restore the older folder, or remove it if the new one
    is in place.

    Affects only folders with the name that `_put_in_place` gives for this path.
    """
    pattern = re.compile(re.escape(_replaced_prefix(path)) + "[0-9a-f]{32}")
    with suppress(OSError), os.scandir(path.parent) as entries:
        for entry in [e for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]:
            if os.path.lexists(path):
                _remove(Path(entry.path))
            else:
                os.replace(entry.path, path)


def _flush(path: Path) -> None:
    """Flush a file, or all files of a folder, to the disk, so that after a power cut no rename outlives its content.

    Files whose mode forbids opening are left to the system.
    """
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in files:
        with suppress(PermissionError), open(file, "r+b") as f:
            os.fsync(f.fileno())
    if path.is_dir():
        for folder in (path, *(p for p in path.rglob("*") if p.is_dir())):
            _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    if fcntl is None:  # Windows cannot open folders
        return
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _full(path: Path, size: int, free: int) -> str:
    return (
        f"not enough room for {path}: {size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
        "free some space or choose another disk"
    )
