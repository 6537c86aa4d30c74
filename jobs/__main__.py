"""`python -m jobs` lists the jobs; `python -m jobs NAME ...` runs one, as `python -m jobs.NAME ...` does."""

import importlib
import pkgutil
import sys
from collections.abc import Sequence

import jobs
from jobs.command_line import Job, end_with_error
from jobs.endings import open_streams, print_text
from pcm.errors import InputError, not_known

_PARTS = ("__main__", "command_line", "endings")


def job_names() -> list[str]:
    return sorted({module.name for module in pkgutil.iter_modules(jobs.__path__)} - set(_PARTS))


def load_job(name: str) -> Job:
    """Raises InputError for a name that is no job's."""
    if name not in job_names():
        raise not_known("job", name, job_names())
    return importlib.import_module(f"jobs.{name}").JOB


def main(argv: Sequence[str] | None = None) -> None:
    """List the jobs, or run the one that is named."""
    open_streams()
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print_text(
            "usage: python -m jobs NAME [options], or python -m jobs.NAME [options]; each has --help\n\n"
            + "\n".join(f"  {known:18}{load_job(known).summary}" for known in job_names())
        )
        return
    try:
        job = load_job(name)
    except InputError as error:
        end_with_error(f"{error} (see `python -m jobs`)")
    if argv is None:
        sys.argv[1:] = rest
    job.main(None if argv is None else rest)


if __name__ == "__main__":
    main()
