"""``python -m bert_fused``: the command line."""

import argparse
import sys

from . import demo, info, tune


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bert_fused", description="Fused Triton kernels for BERT encoders.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo.add_arguments(commands.add_parser("demo", help=demo.HELP, description=demo.__doc__))
    info.add_arguments(commands.add_parser("info", help=info.HELP, description=info.__doc__))
    tune.add_arguments(commands.add_parser("tune", help=tune.HELP, description=tune.__doc__))
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
