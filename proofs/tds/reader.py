"""Reading little-endian fields from bytes, and never past their end."""

from __future__ import annotations


class Short(Exception):
    """The bytes ended in the midst of a field."""


class Reader:
    """A place in some bytes.

    Args:
        data: what is read.
        at: where to begin.
    """

    def __init__(self, data: bytes, at: int = 0) -> None:
        self.data = data
        self.at = at

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, count: int) -> bytes:
        """The next bytes.

        Raises:
            Short: there are fewer.
        """
        end = self.at + count
        if end > len(self.data):
            raise Short(f"{count} bytes wanted at {self.at} of {len(self.data)}")
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "little")

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "little")

    def i32(self) -> int:
        return int.from_bytes(self.take(4), "little", signed=True)

    def u64(self) -> int:
        return int.from_bytes(self.take(8), "little")

    def text(self, characters: int) -> str:
        """UTF-16 text of so many code units."""
        return self.take(2 * characters).decode("utf-16-le", "surrogatepass")
