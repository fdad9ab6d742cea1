"""The command `gpt2exp`, also `python -m gpt2exp.train`."""

from gpt2exp.sweep.launch import command, main

__all__ = ["command", "main"]

if __name__ == "__main__":
    main()
