"""Compile C on first use into a cache of this user and load it, or say why that can't be.

The file's name is a hash of the source, the flags, the compiler and the kind of processor, so that
a folder may be shared by environments and machines and an update of any of them makes a new file.
A file that another user could have written is not loaded.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

#: The same results with any instruction set: products and sums are rounded one by one.
FLAGS = ("-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")

#: For compilers that can't make a function in several versions.
_ONE_VERSION = "-DONE_VERSION"

_TIMEOUT = 120  # seconds; it takes half of one


class CompilationError(RuntimeError):
    """The library can't be made or loaded; the message says why."""


def cache_folder() -> Path:
    """Return where libraries are kept: `$XDG_CACHE_HOME/hf_sophia`, or `~/.cache/hf_sophia`."""
    home = os.environ.get("XDG_CACHE_HOME")
    if home and Path(home).is_absolute():
        return Path(home) / "hf_sophia"
    try:
        return Path.home() / ".cache" / "hf_sophia"
    except RuntimeError as error:
        raise CompilationError(f"there is no home folder to keep it in: {error}") from error


def compiled(source: Path) -> ctypes.CDLL:
    """Return the library of a C source, compiled now if it never was.

    Where the cache can't be used, since it is read-only, full or open to other users, the library
    is compiled for this process alone.

    Args:
        source: The C file.

    Raises:
        CompilationError: There is no C compiler, it refuses the source, or no folder will do.
    """
    if os.name != "posix":
        raise CompilationError(f"kernels are compiled on POSIX systems only, this is {os.name}")
    compiler = _compiler()
    try:
        text = source.read_bytes()
    except OSError as error:
        raise CompilationError(f"{source} can't be read: {error}") from error
    what = [*compiler, _version(compiler), *FLAGS, platform.machine(), platform.libc_ver()]
    name = f"{source.stem}-{hashlib.sha256(text + repr(what).encode()).hexdigest()[:24]}.so"
    try:
        return _from_cache(compiler, source, name)
    except (OSError, CompilationError) as refusal:
        logger.info("compiling %s for this process alone: %s", source.name, refusal)
    try:
        with tempfile.TemporaryDirectory(prefix="hf_sophia-") as own:
            _compile(compiler, source, Path(own) / name)
            return ctypes.CDLL(str(Path(own) / name))
    except OSError as error:
        raise CompilationError(f"{source.name} can't be compiled and loaded: {error}") from error


def _from_cache(compiler: list[str], source: Path, name: str) -> ctypes.CDLL:
    folder = cache_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = folder.resolve()
    _check_owner(folder)
    library = folder / name
    if not library.exists():
        _compile(compiler, source, library)
    _check_owner(library)
    return ctypes.CDLL(str(library))


def _compiler() -> list[str]:
    """Return the command of a C compiler: `$CC`, or the first that is installed."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise CompilationError(f"CC={os.environ['CC']!r} is no command: {error}") from error
    if named:
        if shutil.which(named[0]) is None:
            raise CompilationError(f"the compiler of CC={os.environ['CC']!r} is not installed")
        return named
    for candidate in ("cc", "gcc", "clang"):
        if path := shutil.which(candidate):
            return [path]
    raise CompilationError("there is no C compiler (cc, gcc or clang; $CC may name another)")


def _version(compiler: list[str]) -> str:
    return _run([*compiler, "--version"]).stdout.partition("\n")[0]


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CompilationError(f"{shlex.join(command)} took over {_TIMEOUT} s") from error
    except OSError as error:
        raise CompilationError(f"{shlex.join(command)} can't be run: {error}") from error


def _compile(compiler: list[str], source: Path, library: Path) -> None:
    """Write the library in one piece: processes that start together each make their own."""
    descriptor, draft = tempfile.mkstemp(dir=library.parent, suffix=".draft")
    os.close(descriptor)
    try:
        command = [*compiler, *FLAGS, str(source), "-o", draft]
        result = _run(command)
        if result.returncode:
            result = _run([*command, _ONE_VERSION])
        if result.returncode:
            raise CompilationError(f"{shlex.join(command)} failed: {result.stderr.strip()[-500:]}")
        os.chmod(draft, 0o700)
        os.replace(draft, library)
    finally:
        Path(draft).unlink(missing_ok=True)


def _check_owner(path: Path) -> None:
    """Refuse what somebody else owns or may write: loading it would run their code."""
    found = path.lstat()
    others = stat.S_IWGRP | stat.S_IWOTH
    if found.st_uid not in (os.getuid(), 0) or stat.S_ISLNK(found.st_mode):
        raise PermissionError(f"{path} belongs to another user or is a link; remove it")
    if found.st_mode & others:
        raise PermissionError(f"others can write to {path}; run `chmod go-w {path}`")
