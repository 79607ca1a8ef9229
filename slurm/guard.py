"""Stands between a supervisor and a launcher; when either is gone, so is all that was started.

    python -m slurm.guard SECONDS COMMAND ...

Launchers leave ranks behind: `deepspeed` after SIGTERM or SIGKILL, `torchrun` after SIGUSR1 or
SIGKILL. Orphans become children of this process, which lets them save and leave for so many
seconds and then ends them. If this process is killed, the supervisor adopts them and does the same.
"""

import signal
import subprocess
import sys
import time

from slurm.processes import adopt_orphans, die_with_parent, end_descendants


def main(argv: list[str] | None = None) -> int:
    """Entry point; the exit code is the launcher's, 128 + N after signal N."""
    words = sys.argv[1:] if argv is None else argv
    patience_s, command = float(words[0]), words[1:]
    told = []
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    adopt_orphans()
    child = subprocess.Popen(command, preexec_fn=die_with_parent)
    while child.poll() is None and not told:
        time.sleep(0.1)
    if told:  # the supervisor is gone, or wants an end
        child.terminate()
        try:
            child.wait(patience_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if killed := end_descendants(patience_s):
        print(f"guard: {len(killed)} processes outlived their launcher and were ended: {killed}",
              file=sys.stderr, flush=True)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main())
