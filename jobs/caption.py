"""Captions and salient concepts of picture files."""

from typing import Any

from cluster.evaluation.request import CaptionRequest
from jobs.command_line import Job


def run(request: CaptionRequest) -> dict[str, Any]:
    from cluster.evaluation.caption import caption

    return caption(request)


JOB = Job("caption", __doc__, CaptionRequest, run)

if __name__ == "__main__":
    JOB.main()
