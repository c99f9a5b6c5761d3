"""``python -m benchmarks COMMAND``: measurements, and the figures that need no GPU."""

import importlib
import sys

COMMANDS = {
    "run": "ours against every rival on BERT's shapes, interleaved; JSON lines",
    "report": "a Markdown table and plots of what run wrote, or a comparison of two runs",
    "sass": "registers, spills and matrix instructions of every shipped configuration; needs no GPU",
    "matrix": "the same on four Tritons, the oldest to the newest, side by side; needs no GPU",
    "versions": "the tests on other versions of transformers and Triton",
    "host": "what a module call costs the host, ours and eager's; needs no GPU",
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print("usage: python -m benchmarks COMMAND [--help]\n")
        print("\n".join(f"  {name:<10}{what}" for name, what in COMMANDS.items()))
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    return int(importlib.import_module(f"benchmarks.{sys.argv[1]}").main(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
