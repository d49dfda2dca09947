"""Run the command `sisa`: the console script, and `python -m sisa`.

The command line lives in `cluster`, a name that other packages bear. This entry stands outside of it, so
that it can say so.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from sisa.core.errors import EnvironmentFault
from sisa.flows.wiring.upper_houses import COMMAND, load


def main() -> Any:
    """Run the command of this process's arguments. Exit with 6 when another package hides a part of this
    program."""
    try:
        command = load(COMMAND)
    except EnvironmentFault as fault:
        if "--json" in sys.argv[1:]:
            print(json.dumps({"error": fault.to_json()}, indent=2))
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)
    return command()


if __name__ == "__main__":
    main()
