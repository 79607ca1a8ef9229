"""`python -m slurm.cancel RUN`: end the jobs of a run now, on all nodes."""

import sys

from slurm.requests import main

if __name__ == "__main__":
    sys.exit(main(verb="cancel"))
