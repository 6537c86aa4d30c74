"""Match a dataset's captions and pictures anew (SynC), and keep the best: a view. Rerun to resume."""

from typing import Any

from cluster.curation.refine_request import RefineRequest
from jobs.command_line import Job


def run(request: RefineRequest) -> dict[str, Any]:
    from cluster.curation.refine import refine

    return refine(request)


JOB = Job("refine", __doc__, RefineRequest, run)

if __name__ == "__main__":
    JOB.main()
