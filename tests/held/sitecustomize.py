"""A run stops itself (SIGSTOP) once it has recorded a step, until SIGCONT. A signal sent meanwhile reaches the step
after it, however fast or loaded the machine is.

`support.start(..., held="001:5")` puts this folder in PYTHONPATH, so every Python that the command starts reads it: the
run whose folder's name begins with 001 is held after its fifth step.
"""

import os
import signal
from pathlib import Path

from gpt2exp.run import record

name, step_held = os.environ["HELD"].split(":")
write_status = record.write_status


def _then_stop(folder: Path, state: str, step: int, error: str | None = None) -> None:
    write_status(folder, state, step, error)
    if state == "running" and step == int(step_held) and folder.name.startswith(name):
        os.kill(os.getpid(), signal.SIGSTOP)


record.write_status = _then_stop
