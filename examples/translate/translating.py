"""Sentences in, sentences out, with a trained model."""

from __future__ import annotations

from typing import Any

import torch
from batches import pad
from config import Config
from torch import Tensor
from tqdm import tqdm
from vocabulary import BOS, EOS, PAD, Vocabulary

from fused_attn import beam_search, greedy_search


def translate(
    model: Any,
    config: Config,
    vocabulary: Vocabulary,
    sentences: list[str],
    beams: int,
    length_penalty: float,
    batch_size: int,
    device: str,
    quiet: bool = False,
) -> tuple[list[str], list[int]]:
    """Translations, in order, and the indices of sentences that were cut to the longest length.

    An empty sentence has an empty translation.
    """
    rows = vocabulary.encode(sentences)
    longest = config.max_tokens - 1
    cut = [i for i, row in enumerate(rows) if len(row) > longest]
    order = sorted((i for i, row in enumerate(rows) if row), key=lambda i: len(rows[i]))
    found = [""] * len(sentences)
    starts = range(0, len(order), batch_size)
    for start in tqdm(starts, unit="batch", disable=quiet, dynamic_ncols=True):
        chosen = order[start : start + batch_size]
        src = pad([[*rows[i][:longest], EOS] for i in chosen]).to(device)
        # A translation is rarely twice as long as its source.
        max_len = min(config.max_tokens, 2 * src.shape[1] + 10)
        ends = {"bos": BOS, "eos": EOS, "max_len": max_len}
        if beams == 1:
            tokens, _ = greedy_search(model, src, **ends)
        else:
            tokens, _ = beam_search(model, src, **ends, beams=beams, length_penalty=length_penalty)
        texts = vocabulary.decode(
            [[t for t in row if t not in (PAD, BOS, EOS)] for row in tokens.tolist()]
        )
        for i, text in zip(chosen, texts, strict=True):
            found[i] = text
    return found, cut


def attention_maps(model: Any, src: Tensor, tgt: Tensor) -> dict[str, list[Tensor]]:
    """Weights (H, L, S) of each layer of a Transformer, for one pair of sentences.

    Args:
        src: (1, S). tgt: (1, L), from BOS on.

    Returns:
        "encoder", "decoder" and "cross": the layers' self-attention and attention over the source.
    """
    transformer = model.transformer
    watched = {
        "encoder": [layer.self_attn for layer in transformer.encoder.layers],
        "decoder": [layer.self_attn for layer in transformer.decoder.layers],
        "cross": [layer.multihead_attn for layer in transformer.decoder.layers],
    }
    found: dict[str, list[Tensor]] = {name: [] for name in watched}

    def ask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"need_weights": True, "average_attn_weights": False}

    handles = []
    for name, modules in watched.items():
        for module in modules:

            def keep(module: Any, args: Any, output: Any, name: str = name) -> None:
                found[name].append(output[1][0].detach().float().cpu())

            handles.append(module.register_forward_pre_hook(ask, with_kwargs=True))
            handles.append(module.register_forward_hook(keep))
    try:
        with torch.enable_grad():  # torch.nn's inference path would call none of the hooks
            model(src, tgt)
    finally:
        for handle in handles:
            handle.remove()
    return found
