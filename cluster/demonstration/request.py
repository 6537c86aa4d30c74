"""The request of jobs.demo."""

from dataclasses import dataclass

from cluster.generation.request import GenerateRequest
from cluster.options import Request, check_at_least, option
from pcm.spec import DEVICES


@dataclass(frozen=True, kw_only=True)
class DemoRequest(Request):
    """What the demo is asked for."""

    out: str = option("demo", metavar="DIR", writes="folder", help="local folder; run again to resume")
    captions: int = option(2000, help="captions to draw and train on")
    epochs: int | None = option(None, help="training epochs", unset="the embedded preset's")
    seed: int = option(GenerateRequest.seed, help="of drawing and of training")
    device: str = option(
        "auto", choices=DEVICES, help="where to draw, train and evaluate; auto is cuda where there is a GPU"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "captions", "epochs")
