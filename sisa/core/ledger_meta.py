"""Name the keys of the ledger's `meta` table, whose values are texts about the model as a whole.

    config      the run file in canonical form; absent until a first training is committed
    base        name and digest, as JSON
    embedder    name, digest and dimension, as JSON
    key         what identifies the partition key (`event_chain.key_name`)
    model       the model's name, 32 hex digits
    seq         the number of the last commit; the ledger itself writes it

These and the keys below are all that there are.
"""

from __future__ import annotations

DESCRIPTION = ("config", "base", "embedder", "key", "model")  # what `description.describe` reads
FORM = "form"  # the form in which shards get prompts
TRAINED_ANEW = "trained_anew"  # when the model was last trained as a whole
TRAINED_OVER = "over"  # keys of the patches over which the shards are trained, lowest first, as JSON
RESTRICTIONS = "restrictions"  # how often they changed; restricted subjects, and since when, as JSON
READMITTED = "readmitted"  # not empty until the witness knows that deleted ids came in again
HELD_PROMPTS = "held_prompts"  # the last `routing.HeldPrompts`, and of which state, as JSON
CHECKED = "events_checked"  # link and number of the last checked event, as JSON
CYCLE = "drop"  # of California's DROP: the broker, and the day of the last download, as JSON
