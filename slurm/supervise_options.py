"""The command line of `slurm.supervise`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from slurm.launch import LAUNCHERS


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options; what stands behind `--` is `command`."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, command = words, []
    if "--" in words:
        own, command = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="slurm.supervise",
        description="Keep a run going: start its launcher, watch it, decide"
        " what follows. The command of the launcher stands behind `--`.",
    )
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--launcher", choices=LAUNCHERS, help="in a SLURM job: starts the ranks")
    parser.add_argument("--per-node", type=int, default=1, help="ranks on each node")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that each node has to show")
    parser.add_argument(
        "--check",
        default="",
        metavar="MODULE",
        help="started like the trainer before the first try of a job: what its "
        "ranks print says which nodes are unfit (pretrain.node_check)",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=3,
        help="restarts on the same nodes without a new step (default 3)",
    )
    parser.add_argument(
        "--max-fruitless",
        type=int,
        default=3,
        help="tries without a new step that end the run (default 3)",
    )
    parser.add_argument(
        "--silent-minutes",
        type=float,
        default=45.0,
        help="without a heartbeat so long the launcher is ended (default 45)",
    )
    parser.add_argument(
        "--leave-s",
        type=float,
        default=40.0,
        metavar="SECONDS",
        help="ranks without a launcher are ended after so long (default 40)",
    )
    parser.add_argument("--requeue", action="store_true", help="put the job into the queue again")
    parser.add_argument("--chain", metavar="JOB_NAME", help="jobs of this name follow")
    parser.add_argument(
        "--script", type=Path, help="batch script of a successor that keeps away from bad nodes"
    )
    options = parser.parse_args(own)
    options.command = command
    if not command:
        parser.error("say what to run behind `--`")
    if options.launcher and "SLURM_JOB_ID" not in os.environ:
        parser.error(
            f"--launcher {options.launcher} is for SLURM jobs; elsewhere give the "
            "launcher's own command behind `--`"
        )
    return options
