"""One HTML file about a dataset, a training run, its metrics and captions, and a sweep; it needs no network.

Give any of --data, --run, --evaluation and --sweep; paths or URIs.
"""

from typing import Any

from cluster.report.request import ReportRequest
from jobs.command_line import Job


def run(request: ReportRequest) -> dict[str, Any]:
    from cluster.report.make import make_report

    return make_report(request)


JOB = Job("report", __doc__, ReportRequest, run)

if __name__ == "__main__":
    JOB.main()
