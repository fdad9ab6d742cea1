"""The rate of tokenising a text into the cache over tiktoken's alone.

    GPT2EXP_CACHE=/tmp/empty python experiments/throughput/tokenise.py TEXT.jsonl THREADS

TEXT: JSON lines with a document in `text`, of about a megabyte each. THREADS: as many as the machine has cores. With an
empty cache; the text is also hashed, counted and written there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from gpt2exp.config import DataConfig, DataName
from gpt2exp.data import tokens


def main(path: str, threads: int) -> None:
    """Time tiktoken and then `prepare` on the same documents, and print tokens and ratio."""
    with Path(path).open(encoding="utf-8") as file:
        documents = [json.loads(line)["text"] for line in file]
    encoding, alone = tokens.gpt2_encoding(), 0.0
    for first in range(0, len(documents), 64):  # its lists take 36 bytes a token: not all at once
        start = time.perf_counter()
        encoding.encode_ordinary_batch(documents[first : first + 64], num_threads=threads)
        alone += time.perf_counter() - start
    start = time.perf_counter()
    source = tokens.prepare(DataConfig(name=DataName.text, path=path))
    print(f"{source.tokens:,} tokens, rate over tiktoken's {alone / (time.perf_counter() - start):.2f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
