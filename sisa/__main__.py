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
# Thresholds of the garbage collector: imports and training make many objects and no garbage.
FEW_COLLECTIONS, NO_COLLECTION = (50_000, 20, 100), (2_000_000, 20, 100)


def main() -> Any:
    """Run the command of this process's arguments. Exit with 6 when another package hides a part."""
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    gc.set_threshold(*(NO_COLLECTION if asked in ASK_ONCE else FEW_COLLECTIONS))
    try:
        command = load(COMMAND)
    except EnvironmentFault as fault:
        if "--json" in sys.argv[1:]:
            print(json.dumps({"error": fault.to_json()}, indent=2))
        print(f"error: {fault}", file=sys.stderr)
        sys.exit(fault.exit_code)
    if asked in (*ASK_ONCE, *TRAIN):
        import_quickly(trains=asked in TRAIN)
    atexit.register(gc.freeze)  # torch's objects are not collected at the end, which takes a second
    return command()


if __name__ == "__main__":
    main()
