"""`python -m gpt2exp.isolated RUN_DIR`: the run that a folder's `.hydra/config.yaml` describes, in this process.

What `sweep.isolate=true` starts for each job.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gpt2exp import owner, signals, train, view
from gpt2exp.config import BadRequest


def main() -> int:
    """Exit code 0 if the run is done, 1 if not, 2 if another process is at work on it, 130 or 143 if interrupted."""
    view.show_warnings()
    folder = Path(sys.argv[1])
    try:
        with signals.terminable(), owner.held(folder):
            return 0 if train.run(folder)["state"] == "done" else 1
    except BadRequest as error:
        view.refuse(str(error))
        return 2
    except OSError as error:
        view.refuse(train.unwritable(error))
        return 1
    except KeyboardInterrupt as interrupt:
        return signals.code(interrupt)


if __name__ == "__main__":
    sys.exit(main())
