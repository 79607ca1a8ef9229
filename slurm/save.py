"""`python -m slurm.save RUN`: save now and go on."""

import sys

from slurm.requests import main

if __name__ == "__main__":
    sys.exit(main(verb="save"))
