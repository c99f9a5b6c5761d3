"""Fused Triton kernels for BERT encoders: exact GELU, gradients, one line to put them into a Hugging Face model.

In Python: bert_fused.fuse(model), print the report it returns, and bert_fused.unfuse(model) to undo it.
Exit codes: 0 success, 1 results differ or nothing could be measured, 2 a command cannot start.
"""

import argparse
import sys
from pathlib import Path

import torch

from . import __version__
from .cli import check, demo, info, tune
from .cli.common import CommandError, Parser

COMMANDS = {"check": check, "demo": demo, "info": info, "tune": tune}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    script = Path(sys.argv[0]).stem
    prog = script if script == "bert-fused" else "python -m bert_fused"
    parser = Parser(prog=prog, description=__doc__, epilog=f"{prog} COMMAND --help says more, with examples.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(name, help=command.HELP, description=command.__doc__, epilog=command.EXAMPLES)
        )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        return int(arguments.run(arguments))
    except CommandError as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(f"{arguments.command}: out of memory on the device; --help lists options that need less", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
