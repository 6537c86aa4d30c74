"""A view of the rows that stay by some rules: by score, captions, concepts, duplicates, marks. No picture is copied."""

from typing import Any

from cluster.curation.curate_request import CurateRequest
from jobs.command_line import Job


def run(request: CurateRequest) -> dict[str, Any]:
    from cluster.curation.curate import curate

    return curate(request)


JOB = Job("curate", __doc__, CurateRequest, run)

if __name__ == "__main__":
    JOB.main()
