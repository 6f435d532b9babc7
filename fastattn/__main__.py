"""``python -m fastattn``: what runs here and why, is it right, is it fast."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

import fastattn

COMMANDS = {
    "info": "versions, CPU, instruction set in force, compiled libraries, devices; works when the package is broken",
    "explain": "which implementation takes a call, and why the others do not",
    "check": "numerical parity with float64 on this machine, beside plain PyTorch's own error",
    "bench": "speed against PyTorch, each row behind a green check of its own shape",
    "tune": "the tiles of the Triton kernels, by measuring on this GPU; written to a file that is used from then on",
    "demo": "a real language model: text, parity and speed beside plain PyTorch",
}
#: The function of a command's module that runs it, where it is not ``main``.
ENTRY = {"demo": "run"}


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments of the named command; only that command's module is imported."""
    parser = argparse.ArgumentParser(prog="python -m fastattn", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        # A command may declare --json itself (to document what it prints); ours is the same switch.
        command = commands.add_parser(name, help=summary, description=summary, conflict_handler="resolve")
        if argv and argv[0] == name:
            module = importlib.import_module(f"fastattn.cli.{name}")
            module.add_arguments(command)
            command.set_defaults(main=getattr(module, ENTRY.get(name, "main")))
        command.add_argument("--json", action="store_true", help="print JSON on stdout and nothing else there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 = good, 1 = a check or a bar failed, 2 = a bad request."""
    argv = sys.argv[1:] if argv is None else argv
    if fastattn.import_error is not None and argv[:1] != ["info"]:
        print(f"fastattn does not import: {fastattn.import_error!r}", file=sys.stderr)
        print("`python -m fastattn info` says more", file=sys.stderr)
        return 1
    args = parse(argv)
    try:
        return args.main(args) or 0
    except (ValueError, NotImplementedError) as error:
        print(f"python -m fastattn {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `… | head` has read enough; what is still buffered must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
