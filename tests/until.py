"""The earlier name of `tests.eventually`."""

from tests.eventually import PATIENCE, wait_until
from tests.eventually import eventually as until

__all__ = ["PATIENCE", "until", "wait_until"]
