"""Published PCM-Net data or checkpoints in, one of our datasets or captioners out. Rerun the same command to resume."""

from typing import Any

from cluster.ingest.request import ImportRequest
from jobs.command_line import Job


def run(request: ImportRequest) -> dict[str, Any]:
    from cluster.ingest.published import import_official

    return import_official(request)


JOB = Job("import_official", __doc__, ImportRequest, run)

if __name__ == "__main__":
    JOB.main()
