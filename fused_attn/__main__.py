"""The command line: `python -m fused_attn {info,demo,selftest}`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ._version import __version__

BENCH_MOVED = (
    "`bench` is no part of the installed package any more: in a checkout of the repository, run "
    "`python -m benchmarks` with the same arguments"
)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:
        print(BENCH_MOVED, file=sys.stderr)
        return 2
    if arguments[:1] == ["selftest"]:
        from .selftest import main as selftest

        return selftest(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m fused_attn", description=__doc__)
    parser.add_argument("--version", action="version", version=f"fused_attn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="which backends can run here, and why others cannot")
    _add_demo(commands)
    commands.add_parser(
        "selftest",
        help="are the kernels right here? keeps a record",
        add_help=False,
    )
    options = parser.parse_args(arguments)
    if options.command == "info":
        from .info import report

        print(report())
        return 0
    return _demo(options)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a small language model with stock torch.nn and fused, side by side",
    )
    demo.add_argument(
        "--text",
        type=Path,
        metavar="PATH",
        help="a text file, or a folder of them; default: the source of Python's standard library",
    )
    demo.add_argument("--steps", type=int, default=50, help="training steps a curve (default 50)")
    demo.add_argument(
        "--minutes",
        type=float,
        default=3.0,
        help="curves that would take the demo longer are left out (default 3)",
    )
    demo.add_argument(
        "--dtype",
        nargs="+",
        choices=("fp32", "bf16"),
        default=["fp32", "bf16"],
        help="precisions of the curves; bf16 is autocast over float32 weights (default both)",
    )
    demo.add_argument(
        "--output",
        type=Path,
        default=Path("demo.png"),
        metavar="PNG",
        help="where the picture of the loss curves goes (default demo.png)",
    )


def _demo(options: argparse.Namespace) -> int:
    if options.steps < 1:
        print(f"`--steps` must be at least 1, got {options.steps}", file=sys.stderr)
        return 2
    if not options.minutes > 0:
        print(f"`--minutes` must be more than 0, got {options.minutes}", file=sys.stderr)
        return 2
    try:
        from .demo import run
    except ModuleNotFoundError as missing:
        print(f"the demo needs {missing.name}: pip install 'fused-attn[demo]'", file=sys.stderr)
        return 2
    precisions = tuple(dict.fromkeys(options.dtype))
    return run(options.text, options.steps, options.output, options.minutes, precisions)


if __name__ == "__main__":
    sys.exit(main())
