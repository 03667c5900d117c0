"""Train a small language model on a text, byte by byte, and let it write on.

    python generate.py --steps 200 --prompt "def "

It prints the loss, what the model writes by each search, and the time with and without a cache.
"""

from __future__ import annotations

import argparse
import sysconfig
import time
from pathlib import Path

import torch
from model import LanguageModel, train

import fused_attn

END = ord("\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    parser.add_argument("--text", type=Path, default=stdlib / "argparse.py")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--max-len", type=int, default=60)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(options.text.read_bytes()), dtype=torch.uint8).long()
    model = LanguageModel(256)
    losses = train(model, text, options.steps, batch=16, length=64)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {options.steps} steps")
    model.eval()
    prompt = torch.tensor([list(options.prompt.encode())])
    search = {"eos": END, "max_len": options.max_len}
    for name, found in (
        ("greedy", fused_attn.greedy_search(model, prompt, **search)),
        ("beam", fused_attn.beam_search(model, prompt, **search, beams=4)),
        ("sample", fused_attn.sample(model, prompt, **search, top_p=0.9)),
    ):
        print(
            f"{name:>6}: {options.prompt}{bytes(found.tokens[0].tolist()).decode(errors='replace')}"
        )
    for use_cache in (True, False):
        start = time.perf_counter()
        fused_attn.greedy_search(model, prompt, **search, use_cache=use_cache)
        print(f"{'with' if use_cache else 'without'} cache: {time.perf_counter() - start:.3f} s")


if __name__ == "__main__":
    main()
