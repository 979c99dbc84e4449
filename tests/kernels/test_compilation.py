"""Compiling on first use: into a cache that only its user can write, or not at all."""

import ctypes
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hf_sophia.kernels import compilation
from hf_sophia.kernels.compilation import CompilationError, cache_folder, compiled

SOURCE = "int answer(void) { return 42; }\n"

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler"
)


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def compilations(monkeypatch) -> list[Path]:
    """The libraries that were compiled."""
    made = []
    compile_once = compilation._compile

    def watched(compiler, source, library) -> None:
        compile_once(compiler, source, library)
        made.append(library)

    monkeypatch.setattr(compilation, "_compile", watched)
    return made


@needs_compiler
def test_it_is_compiled_once_and_again_when_the_source_changes(source, compilations) -> None:
    for _ in range(2):
        assert compiled(source).answer() == 42
    assert len(compilations) == 1
    source.write_text(SOURCE.replace("42", "43"))
    assert compiled(source).answer() == 43
    assert len(compilations) == 2
    assert len(set(compilations)) == 2
    # Nothing else stays behind, and nobody else can write there.
    assert sorted(cache_folder().iterdir()) == sorted(compilations)
    for path in (cache_folder(), *compilations):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


@needs_compiler
def test_processes_that_start_together_all_get_a_whole_library(source, tmp_path) -> None:
    code = (
        "import sys; from pathlib import Path; from hf_sophia.kernels.compilation import compiled\n"
        "sys.exit(compiled(Path(sys.argv[1])).answer() != 42)"
    )
    together = [subprocess.Popen([sys.executable, "-c", code, str(source)]) for _ in range(3)]
    assert [process.wait(120) for process in together] == [0, 0, 0]
    assert len(list(cache_folder().iterdir())) == 1


@needs_compiler
@pytest.mark.parametrize("unsafe", ["folder", "library", "link"])
def test_what_others_can_write_is_not_loaded(source, compilations, unsafe) -> None:
    compiled(source)
    (library,) = compilations
    evil = source.with_name("evil.so")
    shutil.copy(library, evil)
    if unsafe == "link":
        library.unlink()
        library.symlink_to(evil)
    else:
        (library if unsafe == "library" else library.parent).chmod(0o777)
    assert compiled(source).answer() == 42
    assert len(compilations) == 2
    assert not compilations[1].exists(), "it was for this process alone"


@needs_compiler
@pytest.mark.skipif(os.geteuid() == 0, reason="root can write anywhere")
def test_a_read_only_cache_is_done_without(source, compilations) -> None:
    cache_folder().mkdir(parents=True)
    cache_folder().chmod(0o500)
    assert compiled(source).answer() == 42
    assert len(compilations) == 1
    assert not any(cache_folder().iterdir())


@needs_compiler
def test_a_cache_that_can_not_be_a_folder_is_done_without(source, compilations) -> None:
    cache_folder().parent.write_text("a file is in the way")
    assert compiled(source).answer() == 42
    assert not compilations[0].exists()


@needs_compiler
def test_a_damaged_library_is_done_without(source, compilations) -> None:
    compiled(source)
    compilations[0].unlink()  # written over, it would pull the ground from under this process
    compilations[0].write_bytes(b"not a library")
    compilations[0].chmod(0o700)
    assert compiled(source).answer() == 42


@needs_compiler
def test_a_source_that_is_refused_says_what_the_compiler_says(source) -> None:
    source.write_text("int answer(void) { return forty_two; }\n")
    with pytest.raises(CompilationError, match="forty_two.*undeclared"):
        compiled(source)
    assert not any(cache_folder().iterdir())


def test_without_a_compiler_the_message_says_so(source, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(source.parent))
    with pytest.raises(CompilationError, match="no C compiler.*CC"):
        compiled(source)
    monkeypatch.setenv("CC", "nocc -O2")
    with pytest.raises(CompilationError, match="CC='nocc -O2' is not installed"):
        compiled(source)
    monkeypatch.setenv("CC", "gcc 'x")
    with pytest.raises(CompilationError, match="is no command: No closing quotation"):
        compiled(source)
    broken = source.with_name("broken")
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o700)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(CompilationError, match="can't be run"):
        compiled(source)
    monkeypatch.undo()
    with pytest.raises(CompilationError, match="can't be read|no C compiler"):
        compiled(source.with_name("none.c"))


@needs_compiler
def test_the_compiler_of_cc_is_taken_with_its_arguments(source, tmp_path, monkeypatch) -> None:
    real = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    log = tmp_path / "log"
    wrapper = tmp_path / "my cc"
    wrapper.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\nshift\nexec "{real}" "$@"\n')
    wrapper.chmod(0o700)
    monkeypatch.setenv("CC", f"'{wrapper}' -mine")
    assert isinstance(compiled(source), ctypes.CDLL)
    assert any("-mine" in line and "-shared" in line for line in log.read_text().splitlines())


@needs_compiler
def test_a_compiler_without_function_versions_makes_one(source, tmp_path, monkeypatch) -> None:
    source.write_text(f"#ifndef ONE_VERSION\n#error no versions\n#endif\n{SOURCE}")
    assert compiled(source).answer() == 42
