"""What the command lines of the proofs have in common."""

from __future__ import annotations

import argparse
import random


def parser(name: str, words: str | None) -> argparse.ArgumentParser:
    """The parser of `python -m proofs.NAME`; its help is the module's docstring."""
    return argparse.ArgumentParser(
        prog=f"python -m proofs.{name}",
        description=words,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_seed(to: argparse.ArgumentParser) -> None:
    """`--seed`, drawn where it is not given: whoever takes it prints it."""
    to.add_argument("--seed", type=int, default=random.randrange(1 << 32))
