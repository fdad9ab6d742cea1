"""`python -m gpt2exp.sweep.isolated RUN_DIR`: the run that a folder's `.hydra/config.yaml` describes, in this process.

What `sweep.isolate=true` starts for each job.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gpt2exp.config import BadRequest
from gpt2exp.run import job, process, terminal
from gpt2exp.sweep import launch


def main() -> int:
    """Exit code 0 if the run is done, 1 if not, 2 if another process is at work on it, 130 or 143 if interrupted."""
    terminal.show_warnings()
    folder = Path(sys.argv[1])
    try:
        with process.terminable(), process.held(folder):
            return 0 if job.run(folder)["state"] == "done" else 1
    except BadRequest as error:
        terminal.refuse(str(error))
        return 2
    except OSError as error:
        terminal.refuse(launch.unwritable(error))
        return 1
    except KeyboardInterrupt as interrupt:
        return process.code(interrupt)


if __name__ == "__main__":
    sys.exit(main())
