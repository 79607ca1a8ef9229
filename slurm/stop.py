"""`python -m slurm.stop RUN`: save at the next step and end; nothing follows."""

import sys

from slurm.requests import main

if __name__ == "__main__":
    sys.exit(main(verb="stop"))
