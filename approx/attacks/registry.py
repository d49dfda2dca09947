"""All attacks by name, at their default strength.

>>> sorted(ATTACKS)[:3], ATTACKS["relearning"].needs
(['jailbreak', 'leak_at_k', 'membership'], ('asked', 'taught'))
"""

from __future__ import annotations

from collections.abc import Mapping

from approx.attacks.attack import Attack
from approx.attacks.jailbreak import Jailbreak
from approx.attacks.membership import Membership
from approx.attacks.prefix_injection import PrefixInjection
from approx.attacks.quantisation import Quantisation
from approx.attacks.relearning import Relearning, RelearningOutOfDomain
from approx.attacks.rewording import Rewording
from approx.attacks.sampling import LeakAtK

_ALL: tuple[Attack, ...] = (
    *(Membership(), Relearning(), RelearningOutOfDomain(), Quantisation()),
    *(LeakAtK(), Rewording(), PrefixInjection(), Jailbreak()),
)
ATTACKS: Mapping[str, Attack] = {each.name: each for each in _ALL}
