"""gpt2exp: does this choice matter? Paired experiments on GPT-2 pre-training."""
