"""Which half of the driver talks to the double.

mssql-python has two of them: `msodbcsql18`, which needs the system's libltdl, and `mssql-odbc`,
which needs nothing. A process that has loaded one keeps it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os

VARIABLE = "MSSQL_PYTHON_NATIVE_PROVIDER"
PROVIDERS = ("msodbcsql18", "mssql-odbc")


def choose(provider: str = "") -> str:
    """Settle for a provider: the one asked for, else the driver's own choice where it can load.

    Returns:
        Its name; empty where mssql-python is not installed.
    """
    if importlib.util.find_spec("mssql_python") is None:
        return ""
    os.environ[VARIABLE] = provider or os.environ.get(VARIABLE) or _loadable()
    return os.environ[VARIABLE]


def _loadable() -> str:
    try:
        ctypes.CDLL("libltdl.so.7")
    except OSError:
        return PROVIDERS[1]
    return PROVIDERS[0]
