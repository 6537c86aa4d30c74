"""A dataset or captioner in published PCM-Net files, WebDataset or Hugging Face Parquet. Rerun to resume."""

from typing import Any

from cluster.export.request import ExportRequest
from jobs.command_line import Job


def run(request: ExportRequest) -> dict[str, Any]:
    from cluster.export.export import export

    return export(request)


JOB = Job("export", __doc__, ExportRequest, run)

if __name__ == "__main__":
    JOB.main()
