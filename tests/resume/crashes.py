"""Run an action in a forked process that is killed, as by SIGKILL or a power failure, at a chosen moment."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Operations on the disk at which a process may be killed.
OPERATIONS = ("fsync", "rename", "replace", "unlink", "mkdir", "rmdir")


def _in_child(action: Callable[[], Any], before: Callable[[], None]) -> int:
    """Run `action` in a forked process; return its exit code, negative if a signal ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            before()
            action()
            code = 0
        finally:
            # Neither pytest nor exit handlers run in the child.
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def killed_at_operation(action: Callable[[], Any], number: int) -> bool:
    """Kill the process right before its disk operation `number`, from 0; return whether it had that many."""

    def arm() -> None:
        count = [0]
        for name in OPERATIONS:
            plain = getattr(os, name)

            def counted(*arguments: Any, plain: Callable[..., Any] = plain, **named: Any) -> Any:
                if count[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1
                return plain(*arguments, **named)

            setattr(os, name, counted)

    code = _in_child(action, arm)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def killed_after(action: Callable[[], Any], seconds: float) -> bool:
    """Kill the process after this time; return whether it was still running."""

    def arm() -> None:
        def kill() -> None:
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()

    code = _in_child(action, arm)
    assert code in (0, -signal.SIGKILL), code
    return code != 0


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Content of all files under a folder by relative path."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
