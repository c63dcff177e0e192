"""What the Sentinel answers to a command of another process whose work it did, or could not do."""

from __future__ import annotations

import logging
from collections.abc import Awaitable

from casparian_flow.errors import CasparianError, ExitCode
from casparian_flow.protocol import Reply

log = logging.getLogger(__name__)


async def answered(work: Awaitable[str]) -> Reply:
    """The outcome of some work in words, whatever it is: who asked waits for it."""
    try:
        return Reply(ok=True, text=await work)
    except CasparianError as error:
        return Reply(ok=False, text=error.message, hint=error.hint, exit_code=error.exit_code)
    except Exception as error:
        log.exception("a command's work failed in a way we did not expect")
        return Reply(
            ok=False,
            text=f"the daemon failed in a way we did not expect: {type(error).__name__}: {error}",
            hint="its log has the traceback; report what it says",
            exit_code=ExitCode.BUG,
        )
