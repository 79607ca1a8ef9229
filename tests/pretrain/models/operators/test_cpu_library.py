"""Compiling the C++ operators: once for all processes, never a hang, and a reason if it fails."""

import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pretrain.models.operators import cpu_library
from tests.pretrain.models.operators.dcnv3_cases import random_case, results

# Stands in for a compiler: takes its time, writes what it is asked for, and keeps a record.
_COMPILER = """#!/bin/sh
case "$*" in *--version) echo pretended 1.0; exit 0;; esac
echo "$@" >> {record}
{action}
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """Makes a compiler that runs a line of shell before it writes; returns its record."""

    def make(action: str) -> Path:
        record, program = tmp_path / "record", tmp_path / "compiler"
        program.write_text(_COMPILER.format(record=record, action=action))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("CXX", str(program))
        monkeypatch.setenv("OMNIPRETRAIN_CACHE", str(tmp_path / "cache"))
        return record

    return make


@pytest.fixture
def unloaded():
    """Forgets what is known of the library, before and after."""
    cpu_library.missing.cache_clear()
    yield
    cpu_library.missing.cache_clear()


def _process() -> subprocess.Popen:
    code = "from pretrain.models.operators.cpu_library import library; print(library())"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_processes_that_start_together_compile_once(pretended):
    record = pretended("sleep 0.3")
    processes = [_process() for _ in range(4)]
    paths = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(paths) == 1 and Path(paths.pop()).read_text(encoding="utf-8") == "library\n"
    # Each source once, and one link.
    assert len(record.read_text().splitlines()) == len(cpu_library._SOURCES) + 1


def test_a_killed_compilation_does_not_hold_up_the_next(pretended, tmp_path):
    record = pretended("sleep 600")
    process = _process()
    deadline = time.monotonic() + 60
    while not record.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    folder = tmp_path / "cache" / "operators"
    assert list(folder.glob(".build-*"))
    pretended("true")
    path = cpu_library.library()
    assert path.exists()
    assert [entry.name for entry in folder.iterdir()] == [path.name]


def test_without_a_compiler_torch_takes_over(unloaded, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    case = random_case((1, 3, 3, 4), groups=2)
    with caplog.at_level(logging.WARNING):
        found = [results(case), results(case)]
    warnings = [r.message for r in caplog.records if r.name == "omnipretrain.operators"]
    assert len(warnings) == 1 and "install g++ or set CXX" in warnings[0]
    expected = results(case, "torch")
    assert all(torch.equal(found[1][name], expected[name]) for name in expected)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler 'no-such-compiler'"):
        results(case, "cpp")


@pytest.mark.parametrize(
    "action, words",
    [
        (
            "echo 'lanes.h:1: error: too modern' >&2; exit 3",
            "status 3: lanes.h:1: error: too modern",
        ),
        ("echo Killed >&2; kill -9 $$", "status -9: Killed"),
    ],
)
def test_a_compiler_that_fails_is_quoted(pretended, unloaded, tmp_path, action, words):
    pretended(action)
    assert words in cpu_library.missing()
    assert list((tmp_path / "cache" / "operators").iterdir()) == []


def test_a_library_that_cannot_be_loaded_is_named(pretended, unloaded):
    pretended("true")
    assert str(cpu_library.library()) in cpu_library.missing()


def test_a_cache_that_cannot_be_written(pretended, unloaded, tmp_path):
    pretended("true")
    (tmp_path / "cache").write_text("a file")
    assert "cache" in cpu_library.missing()


def test_a_library_is_named_by_what_it_depends_on(pretended, monkeypatch):
    pretended("true")
    compiler = [os.environ["CXX"]]
    flags = {
        name: cpu_library._fingerprint(compiler, value)
        for name, value in cpu_library._VECTOR_FLAGS.items()
    }
    assert len(set(flags.values())) == 2
    plain, narrow = (cpu_library._fingerprint([*compiler, *more], ()) for more in ((), ("-m32",)))
    assert plain != narrow
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert cpu_library._fingerprint(compiler, ()) not in flags.values()


def test_a_compiler_may_have_arguments(pretended, monkeypatch, tmp_path):
    """As in CXX="ccache g++"; a path with a space in it is one word, an empty CXX none."""
    record = pretended("true")
    program = os.environ["CXX"]
    monkeypatch.setenv("CXX", f"{program} -m64")
    cpu_library.library()
    assert all(line.startswith("-m64 ") for line in record.read_text().splitlines())
    spaced = tmp_path / "with space"
    spaced.symlink_to(program)
    monkeypatch.setenv("CXX", str(spaced))
    assert cpu_library._compiler() == [str(spaced)]
    (tmp_path / "c++").symlink_to(program)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "")
    assert cpu_library._compiler() == ["c++"]


def test_a_user_without_a_home_computes_all_the_same(pretended, unloaded, monkeypatch):
    pretended("true")
    monkeypatch.delenv("OMNIPRETRAIN_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user number alone
    assert "no home folder; set OMNIPRETRAIN_CACHE to an absolute" in cpu_library.missing()
    assert results(random_case((1, 3, 3, 4), groups=2))["output"].isfinite().all()


def test_a_home_that_cannot_be_written_names_the_variable(pretended, unloaded, monkeypatch):
    pretended("true")
    monkeypatch.delenv("OMNIPRETRAIN_CACHE")
    monkeypatch.setenv("HOME", os.devnull)
    assert "set OMNIPRETRAIN_CACHE to a folder that can be written" in cpu_library.missing()


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_narrower_vectors(capability):
    """The goldens and the comparison with PyTorch, by kernels for lesser CPUs."""
    if cpu_library.missing() is not None:
        pytest.skip(cpu_library.missing())
    folder = Path(__file__).parent
    tests = [
        folder / name
        for name in ("test_dcnv3.py", "test_dcnv3_backends.py", "test_ms_deform_attn.py")
    ]
    code = (
        f"import sys, pytest, torch\n"
        f"assert torch.backends.cpu.get_cpu_capability() == {capability.upper()!r}\n"
        f"sys.exit(pytest.main(['-q', *{[str(test) for test in tests]!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
    )
    assert done.returncode == 0, done.stdout + done.stderr
