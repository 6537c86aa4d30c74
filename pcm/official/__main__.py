"""`python -m pcm.official verify GOLDEN.safetensors` recomputes every output of a golden file."""

import argparse
import json
import sys

from pcm.errors import InputError
from pcm.official.golden import verify


def main(arguments: list[str] | None = None) -> int:
    """Command line: 0 = every output agrees, 1 = some do not, 2 = unreadable file (one line on stderr)."""
    parser = argparse.ArgumentParser(prog="python -m pcm.official", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="recompute every output of a golden file; prints one JSON line")
    command.add_argument("golden", metavar="GOLDEN.safetensors", help="with GOLDEN.json beside it")
    try:
        report = verify(parser.parse_args(arguments).golden)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
