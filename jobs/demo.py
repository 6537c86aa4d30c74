"""The main job end to end on embedded models: captions in, pictures, a captioner and its COCO metrics out."""

from typing import Any

from cluster.demonstration.request import DemoRequest
from jobs.command_line import Job
from jobs.endings import print_text


def run(request: DemoRequest) -> dict[str, Any]:
    from cluster.demonstration.run import run_demo

    return run_demo(request, show=print_text)


JOB = Job("demo", __doc__ or "", DemoRequest, run)

if __name__ == "__main__":
    JOB.main()
