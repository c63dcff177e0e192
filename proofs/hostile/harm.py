"""Runs the corpus with neither Gatekeeper nor sandbox: `python -m proofs.hostile.harm INPUT`.

The last line it prints is JSON, an attack's id to whether it did harm. In a process of its own,
with HOSTPW in its environment: some attacks change what they run in.
"""

from __future__ import annotations

import json
import sys
import types
from typing import Any

from proofs.hostile.corpus import ATTACKS, Attack


def harm(attack: Attack, file_path: str) -> bool:
    """What one attack reports of itself."""
    module: Any = types.ModuleType("casparian_plugin")
    exec(compile(attack.source, "p.py", "exec", dont_inherit=True), module.__dict__)
    tables: list[Any] = []
    handler = module.Handler()
    handler._publish = lambda topic, data: tables.append(data)
    handler.execute(file_path)
    return bool(tables[0]["harm"][0].as_py())


if __name__ == "__main__":
    print(json.dumps({attack.id: harm(attack, sys.argv[1]) for attack in ATTACKS}))
