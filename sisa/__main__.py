"""Run the command `sisa`: report a package that hides `cluster`, which holds the command line."""

from __future__ import annotations

import atexit
import gc
import json
import sys
from typing import Any

from sisa.core.errors import EnvironmentFault
from sisa.flows.wiring.upper_houses import COMMAND, load
from sisa.lm.base.quick_import import import_quickly

ASK_ONCE = ("find", "generate")  # commands that train nothing
TRAIN = ("add", "forget", "rectify", "run", "train")
FEW_COLLECTIONS = (50_000, 20, 100)  # imports make a million objects and no garbage; nor does training


def main() -> Any:
    """Run the command of this process's arguments. Exit with 6 when another package hides a part."""
    gc.set_threshold(*FEW_COLLECTIONS)
    try:
        command = load(COMMAND)
    except EnvironmentFault as fault:
        if "--json" in sys.argv[1:]:
            print(json.dumps({"error": fault.to_json()}, indent=2))
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)
    if sys.argv[1:2] and sys.argv[1] in (*ASK_ONCE, *TRAIN):
        import_quickly(trains=sys.argv[1] in TRAIN)
    atexit.register(gc.freeze)  # torch's objects are not collected at the end, which takes a second
    return command()


if __name__ == "__main__":
    main()
