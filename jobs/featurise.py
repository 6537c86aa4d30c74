"""Real photos and their captions in, one of our datasets out: jobs.train takes it alone or mixed with drawn ones.

A row for each (photo, caption) pair; a photo's bytes are stored as they are. Rerun the same command to resume.
"""

from typing import Any

from cluster.ingest.request import PhotoRequest
from jobs.command_line import Job


def run(request: PhotoRequest) -> dict[str, Any]:
    from cluster.ingest.photos import featurise_photos

    return {**featurise_photos(request).summary(), "dataset": request.out}


JOB = Job("featurise", __doc__, PhotoRequest, run)

if __name__ == "__main__":
    JOB.main()
