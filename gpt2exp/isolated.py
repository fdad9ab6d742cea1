"""`python -m gpt2exp.isolated RUN_DIR`: the run that a folder's `.hydra/config.yaml` describes, in this process.

What `sweep.isolate=true` starts for each job.
"""

from __future__ import annotations

import sys
from pathlib import Path

from gpt2exp import train, view


def main() -> int:
    """Exit code 0 if the run is done, 1 if not, 130 or 143 if interrupted."""
    view.show_warnings()
    try:
        with train.terminable():
            return 0 if train.run(Path(sys.argv[1]))["state"] == "done" else 1
    except OSError as error:
        view.refuse(train.unwritable(error))
        return 1
    except KeyboardInterrupt as interrupt:
        return 143 if isinstance(interrupt, train.Terminated) else 130


if __name__ == "__main__":
    sys.exit(main())
