"""All attacks by name, at their default strength.

>>> ATTACKS["relearning"].needs
('asked', 'taught')
"""

from __future__ import annotations

from collections.abc import Mapping

from approx.attacks.attack import Attack
from approx.attacks.depth import Depth
from approx.attacks.linear_probe import LinearProbe
from approx.attacks.membership import Membership
from approx.attacks.prefix_injection import PrefixInjection
from approx.attacks.quantisation import Quantisation
from approx.attacks.relearning import Relearning, RelearningOutOfDomain
from approx.attacks.rewording import Jailbreak, OtherQuestions, Rewording
from approx.attacks.sampling import LeakAtK

_ALL: tuple[Attack, ...] = (
    *(Membership(), Relearning(), RelearningOutOfDomain(), Quantisation()),
    *(LeakAtK(), Rewording(), PrefixInjection(), Jailbreak(), OtherQuestions()),
    *(LinearProbe(), Depth()),
)
ATTACKS: Mapping[str, Attack] = {each.name: each for each in _ALL}
