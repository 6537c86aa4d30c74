"""Prove a dataset from the store alone: nothing missing, doubled or corrupt. Exit status 1 where it fails."""

from typing import Any

from cluster.dataset.request import VerifyRequest
from jobs.command_line import Job


def run(request: VerifyRequest) -> dict[str, Any]:
    from cluster.generation.verify_dataset import verify_dataset

    return verify_dataset(request)


JOB = Job("verify", __doc__, VerifyRequest, run)

if __name__ == "__main__":
    JOB.main()
