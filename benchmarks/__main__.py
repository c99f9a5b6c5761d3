"""``python -m benchmarks COMMAND``: measurements, and the checks that need no GPU."""

import importlib
import sys

COMMANDS = {
    "run": ("run:main", "ours against every rival on BERT's shapes, interleaved; JSON lines"),
    "report": ("report:main", "a Markdown table and plots of what run wrote, or a comparison of two runs"),
    "sass": ("static.sass:main", "registers, spills, waits and instructions of every configuration; needs no GPU"),
    "modelled": ("static.modelled:main", "the cycle model's times of sm_90's kernels, cuBLAS and eager; no GPU"),
    "matrix": ("static.versions:matrix", "the same on four Tritons, the oldest to the newest; needs no GPU"),
    "versions": ("static.versions:main", "the tests on other versions of transformers and Triton"),
    "host": ("static.host:main", "what a module call costs the host, ours and eager's; needs no GPU"),
}


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print("usage: python -m benchmarks COMMAND [--help]\n")
        print("\n".join(f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()))
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    module, function = COMMANDS[sys.argv[1]][0].split(":")
    return int(getattr(importlib.import_module(f"benchmarks.{module}"), function)(sys.argv[2:]))


if __name__ == "__main__":
    sys.exit(main())
