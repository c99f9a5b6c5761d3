"""``python -m benchmarks COMMAND``: measurements, and the figures that need no GPU."""

import importlib
import sys

COMMANDS = {
    "sass": "registers, spills and matrix instructions of every shipped configuration; needs no GPU",
    "host": "microseconds of Python per call, ours and eager's, through Triton's real launcher; needs no GPU",
    "headline": "ours against eager, F.linear and torch.compile on BERT's shapes",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print("usage: python -m benchmarks COMMAND [--help]\n")
        print("\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items()))
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    return int(importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
