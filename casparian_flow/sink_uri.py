"""A sink's URI as people write it: `scheme://path?mode=replace`.

What stands behind the `?` is said of a topic in that sink, not of where the sink is: it is taken
off, and what is left is the URI that is configured, stored and part of the output key.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from casparian_flow.errors import ConfigError
from casparian_flow.protocol import MODES

OPTIONS = {"mode": MODES}
"""Option -> the values it may have."""

_OF_A_SERVER = frozenset("@/:;=")
"""What a connection has in it, and a table's name only in brackets."""

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


class SinkUri(NamedTuple):
    """A sink's URI and what was said behind it."""

    uri: str
    """Without options."""
    mode: str
    """Empty where it says none."""


def read(written: str) -> SinkUri:
    """Take the options off a sink's URI.

    Raises:
        ConfigError: an unknown option or value, or an option twice; the message says which, and
            what is allowed. Or a server or a login where a table is meant; no message repeats
            what may be a secret.
    """
    uri, asked, options = written.partition("?")
    if uri.startswith("mssql://") and "[" not in uri and _OF_A_SERVER & set(uri[8:]):
        raise ConfigError(
            "an mssql:// sink names a table, never a server or a login",
            "write mssql://table or mssql://schema.table; the connection is configured: [mssql]",
        )
    said: dict[str, str] = {}
    for option in options.split("&") if asked else []:
        name, _, value = option.partition("=")
        if name not in OPTIONS:
            allowed = ", ".join(OPTIONS)
            raise _refused(uri, f"has no option {name[:40]!r}; there is: {allowed}")
        if name in said:
            raise _refused(uri, f"gives {name} twice")
        if value not in OPTIONS[name]:
            allowed = ", ".join(OPTIONS[name])
            raise _refused(uri, f"has no {name} {value[:40]!r}; there are: {allowed}")
        said[name] = value
    return SinkUri(uri, said.get("mode", ""))


def expanded(uri: str, value_of: Callable[[str], str]) -> str:
    """The URI with each `${NAME}` replaced by its value, which is not looked into again.

    Args:
        value_of: a variable's value; raises what is to be raised where it has none to give.
    """
    return _VARIABLE.sub(lambda found: value_of(found[1]), uri)


def _refused(uri: str, fault: str) -> ConfigError:
    return ConfigError(
        f"sink {uri[:200]!r} {fault}", f"write it like parquet://output?mode={MODES[0]}"
    )
