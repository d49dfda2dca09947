"""`python -m cluster`: the command `sisa` where no console script is installed, as in a job's folder.

Rules: the same command.

Not covered: anything else.
"""

from cluster.cli.cli import main

main()
