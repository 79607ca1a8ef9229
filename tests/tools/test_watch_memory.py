"""Memory of a command while it runs."""

import json
import sys
import time

import pytest

from tools import watch_memory

MIB = 2**20
TAKE = "import os, time; b = bytearray(200 * 2**20)"
HOLD = "time.sleep(1.2)"


def watch(tmp_path, code: str, *options: str) -> tuple[int, list[dict]]:
    """Exit code and readings of a Python command."""
    out = tmp_path / "readings.jsonl"
    arguments = ["--every", "0.1", "--out", str(out), *options]
    exit_code = watch_memory.main([*arguments, "--", sys.executable, "-c", code])
    return exit_code, [json.loads(line) for line in out.read_text().splitlines()]


def test_the_peak_is_what_the_command_held(tmp_path, capfd):
    code, readings = watch(tmp_path, f"print('begun', flush=True); {TAKE}; {HOLD}")
    peak = max(row["anonymous"] + row["shared"] for row in readings)
    assert code == 0 and 200 * MIB < peak < 260 * MIB
    printed = capfd.readouterr().out
    assert "GiB  begun" in printed and f"peak: {peak / 2**30:.2f} GiB held" in printed


def test_children_count_and_pages_of_several_processes_count_once(tmp_path):
    # A forked child shares its parent's pages until one of them writes.
    _, readings = watch(tmp_path, f"{TAKE}; os.fork(); {HOLD}")
    both = [row["anonymous"] for row in readings if row["processes"] == 2]
    assert 200 * MIB < max(both) < 260 * MIB
    code = f"{TAKE}; {HOLD}"
    alone = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    _, readings = watch(tmp_path, alone)
    assert max(row["anonymous"] for row in readings) > 200 * MIB


def test_the_exit_code_is_that_of_the_command(tmp_path):
    assert watch(tmp_path, "raise SystemExit(7)")[0] == 7


def test_a_command_that_leaves_too_little_is_ended_with_its_children(tmp_path, capfd):
    started = time.monotonic()
    nested = "import subprocess; subprocess.run(['sleep', '60'])"
    code, _ = watch(tmp_path, nested, "--keep-free", "1e6")
    assert code == watch_memory.ENDED and time.monotonic() - started < 50
    assert "ended: less than 1e+06 GiB were available" in capfd.readouterr().err


def test_without_a_command_it_says_how():
    with pytest.raises(SystemExit):
        watch_memory.main(["--every", "1"])
