"""What averaged weights still hold of those that training began with: d^n of them after n steps at a decay d."""

from __future__ import annotations

DECAYS = (0.9999, 0.9995, 0.999, 0.995, 0.99, 0.95)
MOST = 0.05  # of the first weights that goes unsaid
LEAST_STEPS = 100  # of fewer nobody expects images


def held_of_first(decay: float, steps: int) -> str:
    """What there is to say of an average at `decay` after `steps` steps; "" where it holds next to nothing of them."""
    share = decay**steps
    if steps < LEAST_STEPS or share <= MOST:
        return ""
    fit = next(each for each in DECAYS if each**steps <= MOST)
    return (
        f"{share:.0%} of them are still the weights that the run began with after {steps:,} steps at --ema-decay "
        f"{decay:g}, and images are drawn from them; {fit:g} holds {fit**steps:.1%}"
    )
