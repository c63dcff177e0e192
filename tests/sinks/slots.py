"""A slot as a sink must keep it, in a dozen lines: what every sink is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

Key = tuple[int, int]
"""(ordinal, job id) of an output in mode replace."""


@dataclass
class Slot:
    """What was published into a slot, and which of it is retracted."""

    published: set[Key] = field(default_factory=set)
    retracted: set[Key] = field(default_factory=set)

    @property
    def visible(self) -> Key | None:
        """The output whose rows a reader sees."""
        if not self.published or max(self.published) in self.retracted:
            return None
        return max(self.published)

    def retract(self, key: Key) -> None:
        """Only what is to be seen can be taken out of sight."""
        if key == self.visible:
            self.retracted.add(key)

    def reinstate(self, key: Key) -> None:
        self.retracted.discard(key)
