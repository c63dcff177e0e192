"""Benchmark queue: a job that does nothing."""

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*.txt", topic="nothing")


class Handler(BasePlugin):
    def execute(self, file_path: str) -> None:
        pass
