"""Memory of a process, with pages that several share counted once."""

from pathlib import Path

KINDS = ("Pss_Anon", "Pss_Shmem", "Pss_File")


def proportional(pid: int) -> dict[str, int]:
    """Proportional set size of a process by kind, in bytes; empty if there is none any more."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines[1:])
    return {kind: int(fields[kind].split()[0]) * 1024 for kind in KINDS if kind in fields}
