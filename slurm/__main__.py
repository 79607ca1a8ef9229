"""`python -m slurm VERB ...`: runs on a cluster. Each verb has --help.

submit RECIPE [key=value ...] --nodes N --time T      start a run, or go on with it
status [FOLDER]     how runs stand         list [FOLDER]       the same
logs RUN [-f]       what a run says        save RUN            a checkpoint now
stop RUN            save, then end         cancel RUN          end its jobs now
drill RUN --FAULT   do to a running job what a cluster may
supervise RUN -- LAUNCHER ...              keep a run going, without SLURM too
"""

import importlib
import sys
from collections.abc import Sequence

VERBS = ("submit", "status", "list", "logs", "save", "stop", "cancel", "drill", "supervise")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in VERBS:
        print(__doc__, file=sys.stderr)
        return 0 if words[:1] in (["--help"], ["-h"]) else 2
    verb, rest = words[0], words[1:]
    if verb in ("stop", "save", "cancel"):
        return importlib.import_module("slurm.requests").main(rest, verb)
    return importlib.import_module(f"slurm.{'status' if verb == 'list' else verb}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
