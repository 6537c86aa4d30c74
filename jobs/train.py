"""Train PCM-Net on the pairs of one or more datasets: of jobs.generate, jobs.featurise or jobs.import_official."""

from typing import Any

from cluster.training.request import TrainRequest
from jobs.command_line import Job


def run(request: TrainRequest) -> dict[str, Any]:
    from cluster.training.train import train

    return train(request)


JOB = Job("train", __doc__, TrainRequest, run)

if __name__ == "__main__":
    JOB.main()
