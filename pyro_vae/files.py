"""Files that are written whole or not at all, without links, by one process at a time."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

PathLike = str | os.PathLike[str]
Types = dict[str, tuple[type, ...]]  # types allowed for the values of a record, by name
CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
CREATE |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # not on every system


class Locked(ValueError):
    """Another process holds a lock file."""


Content = bytes | str | Iterable[bytes] | Callable[[IO[bytes]], None]


def write(path: PathLike, content: Content) -> None:
    """Creates or replaces a file, wholly or not at all, and flushes it to disk.

    Parts of an iterable are written as they come; a function is called with the open file.

    Raises:
        ValueError: If there is something at `path` that is no plain file, such as a link.
        OSError: If it cannot be written; the message names the file.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is a link or no plain file: remove it, or name another file")
    temporary = path.with_name(f".{uuid4().hex}.tmp")
    try:
        content = content.encode() if isinstance(content, str) else content
        with open(os.open(temporary, CREATE, 0o666), "wb") as file:
            if callable(content):
                content(file)
            else:
                file.writelines([content] if isinstance(content, bytes) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def as_csv(rows: Iterable[Iterable[Any]]) -> str:
    """Returns the rows as the text of a .csv file."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def flush_folder(path: Path) -> None:
    """Flushes a folder to disk: files created or replaced in it survive a loss of power."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_folder(folder: PathLike) -> None:
    """Checks that a folder holds only files and folders: no links, no devices.

    Raises:
        ValueError: If it holds another thing; the message names it.
    """
    folders = [os.fspath(folder)]
    while folders:
        with suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    raise ValueError(
                        f"{entry.path} is a link or no plain file, which a run folder may not "
                        "hold: put the file itself there, or remove it"
                    )


@contextmanager
def reading(path: PathLike) -> Iterator[None]:
    """Turns errors about the content of a file into a ValueError that names the file."""
    try:
        yield
    except (OSError, MemoryError, FloatingPointError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        if type(error) is ValueError:  # ours, which says what to do
            raise ValueError(f"{path}: {error}") from error
        raise ValueError(
            f"{path} is damaged: {type(error).__name__}: {error}; restore it from a copy"
        ) from error


def check_types(record: Mapping[str, Any], kinds: Types) -> None:
    """Checks that a record has all values, and that they have the right types.

    Raises:
        LookupError: If a value is missing.
        TypeError: If a value has another type; the message names it.
    """
    for name in kinds:
        if type(record[name]) not in kinds[name]:
            raise TypeError(f"{name} is {record[name]!r}")


@contextmanager
def parsing(path: PathLike, what: str, remedy: str = "write it again") -> Iterator[None]:
    """Turns any error of a parser into a ValueError that names the file."""
    try:
        yield
    except Exception as error:
        if str(error).startswith(f"{path}: "):  # ours
            raise
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: expected {what}, got: {line}; {remedy}") from error


@contextmanager
def locked(path: PathLike) -> Iterator[None]:
    """Holds a lock file while the context lasts, or until the process dies; makes its folder.

    The folder, and those above it that were made, are removed in the end if they are empty.

    Raises:
        Locked: If another process holds it.
    """
    path = Path(path)
    folders = [path.parent, *(folder for folder in path.parent.parents if not folder.exists())]
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, flags, 0o666), "r+b", 0) as file:
        is_held = False
        with suppress(FileNotFoundError):  # a process that has just ended removed it
            is_held = _lock(file.fileno()) and os.path.samestat(
                os.fstat(file.fileno()), os.lstat(path)
            )
        if not is_held:
            raise Locked(
                f"{path.parent} is being written by another process: wait until it ends, or "
                "choose another folder"
            )
        try:
            yield
        finally:
            with suppress(OSError):
                path.unlink()
                for folder in folders:
                    folder.rmdir()


def _lock(handle: int) -> bool:
    """Locks a file; returns whether that succeeded, or True on a system without locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # a system, or a file system, without locks
        return True
    return True
