"""GPT-2: the modules, the loss, how the weights start, Hugging Face's format."""
