"""docs/tables.md is run as it stands: its commands in an empty directory, its outputs compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tables.md"


class Step(NamedTuple):
    """A command of the page, and the lines that it prints there."""

    command: str
    printed: list[str]


def steps(section: str) -> Iterator[Step]:
    """The commands of every console block; a line that begins with `> ` goes on with one."""
    for block in re.findall(r"```console\n(.*?)```", section, re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            more = next(
                (n for n, line in enumerate(lines) if n and not line.startswith("> ")), None
            )
            command = [lines[0], *(line[2:] for line in lines[1:more])]
            yield Step("\n".join(command), lines[more:] if more else [])


SECTIONS = re.split(r"^(?=\*\*\d\. )", PAGE.read_text("utf-8"), flags=re.MULTILINE)[1:]


def squeezed(line: str) -> str:
    return " ".join(line.split())


def is_printed(line: str, output: list[str]) -> bool:
    """Whether the output has the line; `...` stands for what differs from run to run."""
    parts = [re.escape(part.strip()) for part in squeezed(line).split("...")]
    wanted = re.compile(r".*".join(parts))
    return any(wanted.fullmatch(each) for each in output)


class Story:
    """The page's directory, and how far it has come there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.told = 0

    def tell(self, section: int) -> None:
        """Run the sections up to this one that were not run yet."""
        while self.told <= section:
            self.told += 1
            for step in steps(SECTIONS[self.told - 1]):
                self._run(step)

    def _run(self, step: Step) -> None:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        done = subprocess.run(
            ["bash", "-c", step.command],
            cwd=self.folder,
            env={**os.environ, "PATH": path, "COLUMNS": "200", "NO_COLOR": "1"},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        said = f"$ {step.command}\n{done.stdout}{done.stderr}"
        print(said)
        assert done.returncode == 0, said
        output = [squeezed(line) for line in (done.stdout + done.stderr).splitlines()]
        missing = [line for line in step.printed if not is_printed(line, output)]
        assert not missing, f"{missing} is not in what was printed by {said}"


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    return Story(tmp_path_factory.mktemp("page"))


@pytest.mark.slow
@pytest.mark.parametrize("section", range(len(SECTIONS)))
def test_the_page_is_so(story: Story, section: int) -> None:
    story.tell(section)


def test_every_section_runs_commands() -> None:
    assert [bool(list(steps(section))) for section in SECTIONS] == [True] * 6
