"""What the server behind `support.FORKING` imports and builds once, so that the processes forked from it need not."""

from __future__ import annotations

import pytest
import scipy.stats
import support
import wandb
from hydra.core.plugins import Plugins

from gpt2exp.compare import figures
from gpt2exp.model import init, init_check
from gpt2exp.run import checkpoint
from gpt2exp.sweep import composing
from gpt2exp.training import measures, precision, trainer

DONE = (pytest, scipy.stats, support, wandb, figures, init, init_check, checkpoint, measures, precision)
DONE += (trainer,)
Plugins.instance()
composing.register()
