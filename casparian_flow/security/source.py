"""A plugin's source becomes a syntax tree: parsed, never compiled, never run."""

from __future__ import annotations

import ast
import io
import tokenize
import warnings

from casparian_flow.errors import PluginError

SOURCE_LIMIT = 1 << 20
"""Bytes. A plugin is a page of code; parsing takes hundreds of times its size in memory."""


def parse(source: bytes, file_name: str) -> ast.Module:
    """The syntax tree of a plugin's source, of which nothing is run.

    Args:
        source: the file's bytes; UTF-8, at most `SOURCE_LIMIT` of them.
        file_name: the file's name, for messages.

    Raises:
        PluginError: the source is too long, too deep, not UTF-8 or not Python.
    """
    if len(source) > SOURCE_LIMIT:
        raise PluginError(
            f"{file_name} has {len(source)} bytes; a plugin may have {SOURCE_LIMIT}",
            "move data out of the source, and code into a package that it depends on",
        )
    if b"\0" in source:
        raise PluginError(f"{file_name} has NUL bytes: it is not Python source", "publish a .py")
    try:
        # Other codecs are not only rare: some take hours to decode what they were not made for.
        encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
        if encoding not in ("utf-8", "utf-8-sig"):
            raise SyntaxError(f"the source says that its encoding is {encoding}, not UTF-8")
        with warnings.catch_warnings():
            # An author's "\d" is between the author and Python.
            warnings.simplefilter("ignore")
            return ast.parse(source, file_name)
    # Bytes that are not UTF-8 are a SyntaxError in most places, a UnicodeDecodeError in some.
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        text = printable((getattr(error, "text", None) or "").strip())
        raise PluginError(
            f"{file_name}{f' line {line}' if line else ''}: {getattr(error, 'msg', error)}"
            + (f": {text}" if text else ""),
            "mend that line, and save the file as UTF-8",
        ) from error
    except (RecursionError, MemoryError) as error:
        raise PluginError(
            f"{file_name} nests expressions too deeply to be read", "split the deepest one"
        ) from error


def printable(text: str) -> str:
    """The start of a stranger's text, without what would move a terminal's cursor."""
    return "".join(character if character.isprintable() else "?" for character in text[:60])
