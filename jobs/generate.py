"""Captions in, a dataset of synthetic images with CLIP scores and features out. Rerun the same command to resume."""

from typing import Any

from cluster.generation.request import GenerateRequest
from jobs.command_line import Job


def run(request: GenerateRequest) -> dict[str, Any]:
    from cluster.generation.make import generate

    return generate(request)


JOB = Job("generate", __doc__, GenerateRequest, run)

if __name__ == "__main__":
    JOB.main()
