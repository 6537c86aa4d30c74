"""Caption pictures with references by beam search and compute the COCO metrics."""

from typing import Any

from cluster.evaluation.request import EvaluateRequest
from jobs.command_line import Job


def run(request: EvaluateRequest) -> dict[str, Any]:
    from cluster.evaluation.evaluate import evaluate

    return evaluate(request)


JOB = Job("evaluate", __doc__, EvaluateRequest, run)

if __name__ == "__main__":
    JOB.main()
