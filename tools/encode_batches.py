"""Encode batches of token ids with one system, as often as asked: a process of ``tools/measure_packing.py``.

    python tools/encode_batches.py SYSTEM PATH BATCHES.npz THREADS OUTPUT.npy

SYSTEM is a target of xformopt, or ``sentence-transformers``, which runs in an environment without xformopt.  Writes the
embeddings of a first pass, prints a line, and then, for every line it reads, the seconds of one more pass.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Batch = dict[str, np.ndarray]


def open_system(system: str, path: str, threads: int) -> Callable[[Batch], np.ndarray]:
    """Return what makes sentence embeddings of one padded batch."""
    if system == "sentence-transformers":
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        model = SentenceTransformer(path, device="cpu")

        def encode(batch: Batch) -> np.ndarray:
            with torch.inference_mode():
                features = {name: torch.from_numpy(value) for name, value in batch.items()}
                embedding: np.ndarray = model(features)["sentence_embedding"].numpy()
            return embedding

        return encode
    from xformopt.lowering import open_runner

    runner = open_runner(system, Path(path), threads=threads)
    return lambda batch: sentence_embedding(runner.run(batch))


def sentence_embedding(outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the embeddings ``[B, C]``: torch's exporter gives outputs names of its own."""
    named = outputs.get("sentence_embedding")
    return next(value for value in outputs.values() if value.ndim == 2) if named is None else named


def read_batches(path: str) -> list[Batch]:
    """Read the batches: arrays are named ``number.input``."""
    found: dict[int, Batch] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            number, _, name = key.partition(".")
            found.setdefault(int(number), {})[name] = arrays[key]
    return [found[number] for number in sorted(found)]


def main() -> None:
    """Serve passes over the batches until the input ends."""
    system, path, arrays, threads, output = sys.argv[1:]
    batches = read_batches(arrays)
    encode = open_system(system, path, int(threads))
    np.save(output, np.concatenate([encode(batch) for batch in batches]))
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for batch in batches:
            encode(batch)
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
