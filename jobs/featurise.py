"""Real photos and their captions in, one of our datasets out; or a dataset in, and it comes out with another CLIP.

A row for each (photo, caption) pair, or of --data each row; a picture's bytes are stored as they are. Rerun the same
command to resume.
"""

from typing import Any

from cluster.ingest.request import FeaturiseRequest
from jobs.command_line import Job


def run(request: FeaturiseRequest) -> dict[str, Any]:
    if request.data is not None:
        from cluster.ingest.another_clip import featurise_dataset

        return featurise_dataset(request)
    from cluster.ingest.photos import featurise_photos

    return {**featurise_photos(request).summary(), "dataset": request.out}


JOB = Job("featurise", __doc__, FeaturiseRequest, run)

if __name__ == "__main__":
    JOB.main()
