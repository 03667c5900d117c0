"""BLEU of a trained model: `python evaluate.py --checkpoint RUN/best.pt --data DIR`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import checkpoint
import plots
import sacrebleu
from batches import pad
from corpus import read_pairs
from errors import UserError, run
from training import load_model
from translating import attention_maps, translate
from vocabulary import BOS, EOS

# Sentences of up to so many words of the source, the last group of all others.
LENGTHS = (8, 12, 16, 20)


def by_length(sources: list[str], found: list[str], targets: list[str]) -> dict[str, Any]:
    """BLEU and number of the sentences of each group of lengths."""
    groups: dict[str, tuple[list[str], list[str]]] = {}
    low = 1
    for high in (*LENGTHS, 10**9):
        name = f"{low}-{high}" if high < 10**9 else f"{low}+"
        chosen = [i for i, s in enumerate(sources) if low <= len(s.split()) <= high]
        groups[name] = ([found[i] for i in chosen], [targets[i] for i in chosen])
        low = high + 1
    return {
        name: {"sentences": len(ours), "bleu": sacrebleu.corpus_bleu(ours, [theirs]).score}
        for name, (ours, theirs) in groups.items()
        if ours
    }


def draw_attention(model: Any, vocabulary: Any, source: str, found: str, out: Path) -> None:
    """The three kinds of attention on one pair, as PNG."""
    src, tgt = vocabulary.encode([source])[0], vocabulary.encode([found])[0]
    src, tgt = [*src, EOS], [BOS, *tgt]
    device = next(model.parameters()).device
    maps = attention_maps(model, pad([src]).to(device), pad([tgt]).to(device))
    sides = {"encoder": (src, src), "decoder": (tgt, tgt), "cross": (tgt, src)}
    titles = {
        "encoder": ("Self-attention of the encoder", "source, query", "source, key"),
        "decoder": ("Self-attention of the decoder", "target, query", "target, key"),
        "cross": ("Attention of the target to the source", "target so far", "source"),
    }
    for name, weights in maps.items():
        rows, columns = (vocabulary.pieces(side) for side in sides[name])
        title, *names = titles[name]
        path = out / f"attention_{name}.png"
        plots.attention(weights, rows, columns, title, path, (names[0], names[1]))


def main() -> None:
    """Translate a test set, score it, and write evaluation.json beside the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="test", help="beginning of the files' names")
    parser.add_argument("--beams", type=int, default=4, help="1 is greedy (default 4)")
    parser.add_argument("--length-penalty", type=float, default=0.6, help="(default 0.6)")
    parser.add_argument("--batch-size", type=int, default=32, help="sentences (default 32)")
    parser.add_argument("--sentence", type=int, default=0, help="that the attention maps show")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    arguments = parser.parse_args()
    if arguments.beams < 1 or arguments.batch_size < 1:
        raise UserError("--beams and --batch-size must be positive")
    model, config, vocabulary, _ = load_model(arguments.checkpoint, arguments.device)
    pairs = read_pairs(arguments.data, arguments.split, config.source, config.target)
    if not 0 <= arguments.sentence < len(pairs):
        raise UserError(f"--sentence must be below {len(pairs)}, got {arguments.sentence}")
    found, cut = translate(
        model,
        config,
        vocabulary,
        pairs.sources,
        arguments.beams,
        arguments.length_penalty,
        arguments.batch_size,
        arguments.device,
    )
    score = sacrebleu.BLEU()
    bleu = score.corpus_score(found, [pairs.targets])
    result = {
        "bleu": bleu.score,
        "signature": str(score.get_signature()),
        "sentences": len(found),
        "cut": len(cut),
        "empty": pairs.empty,
        "beams": arguments.beams,
        "length_penalty": arguments.length_penalty,
        "by_length": by_length(pairs.sources, found, pairs.targets),
    }
    out = arguments.checkpoint.parent
    text = json.dumps(result, indent=1).encode()
    checkpoint.replace_file(out / "evaluation.json", lambda file: file.write(text))
    lines = ("\n".join(found) + "\n").encode()
    checkpoint.replace_file(out / "translations.txt", lambda file: file.write(lines))
    if config.model == "transformer" and found[arguments.sentence]:
        i = arguments.sentence
        draw_attention(model, vocabulary, pairs.sources[i], found[i], out)
    print(f"BLEU {bleu.score:.2f} ({result['signature']}), {len(found)} sentences")
    for name, group in result["by_length"].items():
        print(f"  {name:>6} words: BLEU {group['bleu']:.2f} of {group['sentences']} sentences")
    for name, count in (
        ("cut to the longest length", len(cut)),
        ("with an empty line", pairs.empty),
    ):
        if count:
            print(f"  {count} {name}")


if __name__ == "__main__":
    run(main)
