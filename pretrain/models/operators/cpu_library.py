"""The C++ operators for the CPU: compiled once for a machine, kept in a cache, loaded from there.

The cache is $OMNIPRETRAIN_CACHE, or ~/.cache/omnipretrain. A library in it is named by all that its
code depends on: sources, compiler, torch, and the vector instructions of the CPU (as torch sees
them: ATEN_CPU_CAPABILITY=avx2 holds back wider ones). It needs a C++20 compiler, and nothing else.
"""

import contextlib
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from data_pipeline.files import cache_folder, exclusive, using_cache

_log = logging.getLogger("omnipretrain.operators")

_HERE = Path(__file__).parent
_SOURCES = ("dcnv3_cpu.cpp", "ms_deform_attn_cpu.cpp")
_HEADERS = ("lanes.h", "operator.h", "points.h", "sampling.h")

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2")
_VECTOR_FLAGS = {
    "AVX2": _AVX2,
    "AVX512": (
        *_AVX2,
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ),
}
# Neither NaN nor rounding is given up: only what keeps loops from becoming vectors.
_FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-DNDEBUG",
    "-w",
)
_COMPILER_LIMIT_S = 900.0


class BuildError(RuntimeError):
    """The C++ operators cannot be had on this machine."""


@functools.cache
def missing() -> str | None:
    """Load the C++ operators, compiling them if need be; None, or why they are not to be had.

    A failure is logged once, with what it means.
    """
    try:
        torch.ops.load_library(library())
    except (BuildError, OSError) as error:
        _log.warning("no C++ operators, plain PyTorch computes them, many times slower: %s", error)
        return str(error)
    return None


def library() -> Path:
    """Path of the compiled library; whichever process comes first compiles, others wait for it.

    Errors: BuildError, OSError (a cache that cannot be written).
    """
    compiler = _compiler()
    flags = (*_FLAGS, *_VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ()))
    root = cache_folder()
    if str(root).startswith("~"):
        raise BuildError("this user has no home folder; set OMNIPRETRAIN_CACHE to an absolute path")
    path = root / "operators" / f"cpu_{_fingerprint(compiler, flags)}.so"
    if path.exists():
        return path
    with contextlib.ExitStack() as stack:
        with using_cache():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            locked = stack.enter_context(exclusive(path))
        if locked:
            for leftover in path.parent.glob(f".build-{path.stem}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        if not path.exists():
            _log.info("compiling the C++ operators into %s; this takes a minute, once", path)
            _build(compiler, flags, path)
    return path


def _compiler() -> list[str]:
    """The command that compiles; CXX may hold arguments too ("ccache g++")."""
    wanted = os.environ.get("CXX") or "c++"
    command = [wanted] if shutil.which(wanted) else shlex.split(wanted)
    if not command or shutil.which(command[0]) is None:
        raise BuildError(f"there is no C++ compiler {wanted!r}; install g++ or set CXX")
    return command


def _fingerprint(compiler: list[str], flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_HERE / name).read_bytes())
    facts = (
        " ".join(compiler),
        _output([*compiler, "--version"]),
        flags,
        torch.__version__,
        platform.machine(),
    )
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:20]


def _build(compiler: list[str], flags: tuple[str, ...], path: Path) -> None:
    # Imported here: it looks for CUDA and compilers.
    from torch.utils.cpp_extension import include_paths, library_paths

    includes = [f"-I{folder}" for folder in include_paths()]
    libraries = [f"-L{folder}" for folder in library_paths()]
    with tempfile.TemporaryDirectory(prefix=f".build-{path.stem}-", dir=path.parent) as folder:
        objects = [f"{folder}/{Path(name).stem}.o" for name in _SOURCES]
        for name, object_file in zip(_SOURCES, objects, strict=True):
            _output([*compiler, *flags, *includes, "-c", str(_HERE / name), "-o", object_file])
        built = Path(folder) / path.name
        # OpenMP is not linked: it has to be the one that torch has loaded, not a second one.
        _output(
            [*compiler, "-shared", *objects, *libraries, "-ltorch_cpu", "-lc10", "-o", str(built)]
        )
        # On the disk before it has its name: loading half a library kills the process.
        with open(built, "rb") as file:
            os.fsync(file.fileno())
        os.replace(built, path)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_COMPILER_LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} has not finished in {_COMPILER_LIMIT_S:g} s") from None
    if done.returncode:
        first = [line for line in done.stderr.splitlines() if "error" in line.lower()][:3]
        reason = "; ".join(first) or done.stderr[-500:]
        raise BuildError(f"{command[0]} failed with status {done.returncode}: {reason}")
    return done.stdout
