"""gpt2exp: does this choice matter? Paired experiments on GPT-2 pre-training."""

import gpt2exp.training.optimizers  # noqa: F401 - registers its choices with `gpt2exp.config`
