"""`python -m slurm.list [FOLDER]`: the same as slurm.status."""

import sys

from slurm.status import main

if __name__ == "__main__":
    sys.exit(main())
