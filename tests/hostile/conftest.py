"""The guests' environment, as the tests of the engine have it."""

from tests.engine.conftest import bundle_folder, default_lock, environment, start, store

__all__ = ["bundle_folder", "default_lock", "environment", "start", "store"]
