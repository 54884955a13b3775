"""Prints the cores that this process computes on, once it has met the others."""

import tyro

from cmjax.cores import usable_cores
from cmjax.processes import ProcessGroup

if __name__ == "__main__":
    group = tyro.cli(ProcessGroup)
    group.join(group.processes or 1)
    print(usable_cores())
