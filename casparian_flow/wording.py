"""Numbers in sentences."""

from __future__ import annotations

from collections.abc import Mapping


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 job`, `3,014 jobs`.

    Args:
        plural: where it is not the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def tallied(amounts: Mapping[str, int]) -> str:
    """`3,014 rows, 1 job`.

    Args:
        amounts: plural noun -> how many.
    """
    return ", ".join(counted(number, noun.removesuffix("s")) for noun, number in amounts.items())
