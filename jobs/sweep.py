"""Search hyper-parameters with Ray Tune: train PCM-Net many times on one dataset, with other settings each time."""

from typing import Any

from cluster.sweep.request import SweepRequest
from jobs.command_line import Job


def run(request: SweepRequest) -> dict[str, Any]:
    from cluster.sweep.sweep import sweep

    return sweep(request)


JOB = Job("sweep", __doc__, SweepRequest, run)

if __name__ == "__main__":
    JOB.main()
