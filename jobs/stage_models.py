"""Put the weights of a model beside the data, pinned, for --t2i and --clip: machines copy them from there once."""

from typing import Any

from cluster.weights.request import StageModelsRequest
from jobs.command_line import Job


def run(request: StageModelsRequest) -> dict[str, Any]:
    from cluster.dataset.documents import refuse_dataset
    from cluster.store.store import open_store
    from cluster.weights.stage import stage

    refuse_dataset(open_store(request.out), shown="--out")
    return stage(request)


JOB = Job("stage_models", __doc__, StageModelsRequest, run)

if __name__ == "__main__":
    JOB.main()
