"""Functions in forked processes, to be killed or to be measured, without the seconds that an import takes.

Only for a process that has not computed anything yet: the threads of a parallel region don't survive a fork.
"""

import json
import os
import signal
import sys
import time
import traceback
from typing import NamedTuple


class Outcome(NamedTuple):
    """What became of a forked process: its result, or None; its exit status, negative where a signal ended it."""

    result: object
    status: int


def run_forked(function, *arguments, signal_after=None):
    """Runs function(*arguments), which returns what JSON can hold; `signal_after`, (signal, seconds), interrupts it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            result = function(*arguments)
            with os.fdopen(writing, "w") as pipe:
                json.dump(result, pipe)
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    if signal_after is not None:
        kind, seconds = signal_after
        time.sleep(seconds)
        os.kill(child, kind)  # a zombie until it is waited for, so never another process
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Outcome(json.loads(text) if status == 0 else None, status)
