"""What every job shares: one JSON line last on stdout, logs on stderr, exit 0 / 1 / 2."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from pcm.errors import InputError


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose usage errors are one line on stderr and exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see `{self.prog} --help`)\n")


def make_parser(job: str, description: str) -> argparse.ArgumentParser:
    """The parser of `python -m jobs.<job>`; its --help shows every default."""
    return _Parser(
        prog=f"python -m jobs.{job}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """`parse` as the type of an argument: what its InputError says becomes the usage error."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _is_worth_reading(record: logging.LogRecord) -> bool:
    """open_clip narrates its loading on the root logger; only its warnings concern a user."""
    return record.name != "root" or record.levelno >= logging.WARNING


def run_job(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], dict], argv: list[str] | None = None
) -> None:
    """Parse, run, print the summary as one JSON line, exit.

    0 = done; 2 = bad arguments or input, with one line on stderr; anything else raises, so Python prints the
    traceback and exits with 1. A summary may carry `"ok": False` (a check that ran and failed): exit 1.
    """
    args = parser.parse_args(argv)
    logging.basicConfig(
        level=os.environ.get("PCM_LOG_LEVEL", "INFO"),
        format="%(asctime)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_worth_reading)
    for chatty in ("httpx", "httpcore", "botocore", "aiobotocore", "s3fs", "fsspec", "PIL", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        summary = run(args)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.stderr.flush()
    print(json.dumps(summary, allow_nan=False), flush=True)
    if summary.get("ok") is False:
        sys.exit(1)
