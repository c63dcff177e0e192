"""What a dependency runs when an interpreter starts, it runs inside the sandbox."""

from __future__ import annotations

from pathlib import Path

import pytest

from casparian_flow.engine.bridge import Guest
from casparian_flow.engine.venv_manager import EnvironmentStore
from casparian_flow.sections import GuestSettings
from tests import wheels
from tests.engine.guests import artifact, plugin, run

PTH = (
    "import os; os.environ['PTH'] = 'ran'\n"
    "import pathlib; pathlib.Path({planted!r}).write_text('x')\n"
    "import os; os.environ['SEEN'] = open({secret!r}).read()\n"
)


def test_the_pth_file_of_a_wheel_runs_and_reaches_nothing(
    store: EnvironmentStore,
    default_lock: str,
    bundle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    secret, planted = tmp_path / "secret", tmp_path / "planted"
    secret.write_text("secret")
    code = PTH.format(planted=str(planted), secret=str(secret))
    evil = wheels.wheel(tmp_path / "wheels", "evil", files={"evil.pth": code})
    wheels.use(monkeypatch, tmp_path / "wheels", only=False)
    for inner in ("in", "tmp"):
        (tmp_path / "guest" / inner).mkdir(parents=True)
    body = "self.publish('t', pa.table({n: [os.environ.get(n, '')] for n in ('PTH', 'SEEN')}))"
    with (
        store.lease(default_lock + wheels.pin(evil)) as lease,
        Guest(
            lease.python, lease.site_packages, artifact(plugin(body)),
            folder=tmp_path / "guest", bundle=bundle_folder, limits=GuestSettings(),
        ) as guest,
    ):  # fmt: skip
        guest.load()
        assert run(guest)["t"].to_pylist() == [{"PTH": "ran", "SEEN": ""}]
    assert not planted.exists()


def test_an_environment_that_hides_the_library_is_not_what_a_guest_starts_with(
    store: EnvironmentStore,
    default_lock: str,
    bundle_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Modules of the standard library, as a wheel brings them, come after the real ones."""
    evil = wheels.wheel(tmp_path / "wheels", "evil2", files={"json.py": "raise SystemExit(9)\n"})
    wheels.use(monkeypatch, tmp_path / "wheels", only=False)
    for inner in ("in", "tmp"):
        (tmp_path / "guest" / inner).mkdir(parents=True)
    with (
        store.lease(default_lock + wheels.pin(evil)) as lease,
        Guest(
            lease.python, lease.site_packages, artifact(plugin("json.dumps(1)")),
            folder=tmp_path / "guest", bundle=bundle_folder, limits=GuestSettings(),
        ) as guest,
    ):  # fmt: skip
        guest.load()
        run(guest)
