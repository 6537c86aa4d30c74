"""Few-step models whose steps and guidance are not what their pipeline's `__call__` does by default.

Distilled models share the pipeline class of the model that they come from, whose defaults (50 steps, guidance 7.5)
spoil them. The values are those of the model cards.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class FewSteps:
    steps: int
    guidance_scale: float


#: By the last part of the model's name, in lower case; the first that is found counts.
FEW_STEP_MODELS = (
    (re.compile(r"z-image-turbo"), FewSteps(9, 0.0)),
    (re.compile(r"stable-diffusion-3\.5.*turbo"), FewSteps(4, 0.0)),
    (re.compile(r"flux\.1-schnell"), FewSteps(4, 0.0)),
    (re.compile(r"flux\.2-klein(?!-base)"), FewSteps(4, 1.0)),
    (re.compile(r"^sd(xl)?-turbo"), FewSteps(1, 0.0)),
)
#: The same of what is fused into a model: a LoRA decides before the model it is fused into.
FEW_STEP_LORAS = (
    (re.compile(r"lcm-lora"), FewSteps(4, 1.0)),
    (re.compile(r"(lightning|hyper).*[-_]1step"), FewSteps(1, 0.0)),
    (re.compile(r"(lightning|hyper).*[-_]2step"), FewSteps(2, 0.0)),
    (re.compile(r"(lightning|hyper).*[-_]4step"), FewSteps(4, 0.0)),
    (re.compile(r"(lightning|hyper).*[-_]8step"), FewSteps(8, 0.0)),
)


def few_steps(model: str, loras: tuple[str, ...] = ()) -> FewSteps | None:
    """What the table has for a model with these LoRAs, by their names; None: the pipeline's own defaults."""
    for names, table in ((loras, FEW_STEP_LORAS), ((model,), FEW_STEP_MODELS)):
        for name in names:
            for pattern, found in table:
                if pattern.search(name.rstrip("/").rpartition("/")[2].lower()):
                    return found
    return None
