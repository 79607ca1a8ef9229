"""Bring a checkpoint back from where `checkpoint.copy_to` has copied it, and check every byte.

    python -m tools.fetch_checkpoint s3://bucket/runs/name runs/name
    python -m tools.fetch_checkpoint s3://bucket/runs/name runs/name --step 4000

The run directory may be a new one: its recipe and tokenizer come out of the checkpoint. Then
`python -m pretrain.train --resume runs/name` goes on from it.
"""

import argparse
import sys
from pathlib import Path

from data_pipeline.console import write_utf8
from pretrain.engine.checkpoint.copy import FarCheckpoints
from pretrain.engine.checkpoint.files import CheckpointError


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    write_utf8()
    parser = argparse.ArgumentParser(
        prog="python -m tools.fetch_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("url", help="checkpoint.copy_to of the run")
    parser.add_argument("run_dir", type=Path, help="made if it is not there")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest copy)")
    options = parser.parse_args(arguments)
    try:
        far = FarCheckpoints(options.url)
        step = far.newest() if options.step is None else options.step
        if step is None:
            raise CheckpointError(f"{far.url} holds no copy of a checkpoint")
        folder = far.fetch(step, options.run_dir)
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{folder} is whole; go on with: python -m pretrain.train --resume {options.run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
