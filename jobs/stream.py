"""Generate and train at once: the first epoch takes the pictures as they are made. Rerun the same command to resume."""

from typing import Any

from cluster.training.request import StreamRequest
from jobs.command_line import Job


def run(request: StreamRequest) -> dict[str, Any]:
    from cluster.training.stream import stream

    return stream(request)


JOB = Job("stream", __doc__, StreamRequest, run)

if __name__ == "__main__":
    JOB.main()
