"""Few-step models whose steps and guidance are not what their pipeline's `__call__` does by default.

Distilled models share the pipeline class of the model that they come from, whose defaults (50 steps, guidance 7.5)
spoil them. The values are those of the model cards.
"""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FewSteps:
    steps: int
    guidance_scale: float | None  # None: the pipeline's own


_Table = tuple[tuple[re.Pattern[str], FewSteps | None], ...]

#: By the last part of a name, in lower case, with "-" for "_" and "."; the first that is found counts. None: it is no
#: few-step model, whatever its configuration is called: diffusers configures every Z-Image file as Z-Image-Turbo.
FEW_STEP_MODELS: _Table = (
    (re.compile(r"z-?image(?!.*turbo)"), None),
    (re.compile(r"z-?image.*turbo"), FewSteps(9, 0.0)),
    (re.compile(r"(stable-diffusion-|sd)3-5.*turbo"), FewSteps(4, 0.0)),
    (re.compile(r"flux-?1-schnell"), FewSteps(4, 0.0)),
    (re.compile(r"flux-?2-klein(?!-base)"), FewSteps(4, 1.0)),
    (re.compile(r"^sd-?(xl-?)?turbo"), FewSteps(1, 0.0)),
)
#: The same of what is fused into a model: a LoRA decides before the model it is fused into. Hyper-SD's with CFG in
#: their names keep guidance (5 to 8; of Stable Diffusion 3 as here), and FLUX.1-dev reads its guidance as an input.
FEW_STEP_LORAS: _Table = (
    (re.compile(r"lcm-lora"), FewSteps(4, 1.0)),
    *(
        (re.compile(rf"hyper-sd3.*-{steps}step.*-cfg"), FewSteps(steps, scale))
        for steps, scale in ((4, 3.0), (8, 5.0), (16, 7.0))
    ),
    *((re.compile(rf"hyper.*-{steps}step.*-cfg"), FewSteps(steps, None)) for steps in (8, 12)),
    *((re.compile(rf"hyper-flux.*-{steps}step"), FewSteps(steps, None)) for steps in (8, 16)),
    *((re.compile(rf"(lightning|hyper).*-{steps}step"), FewSteps(steps, 0.0)) for steps in (1, 2, 4, 8)),
)


#: The stem of the file as which diffusers saves any LoRA.
_ANY_LORA = "pytorch_lora_weights"


def few_steps(model: str, loras: tuple[str, ...] = (), config: str | None = None) -> FewSteps | None:
    """What the table has for a model with these LoRAs, by their names; None: the pipeline's own defaults.

    Of a LoRA the last two parts count: ORG/REPO, or REPO/FILE of ORG/REPO/FILE, where either may say what it is; of a
    file on disk its own name, or its folder's where it has the name that diffusers gives to all. config: the name of a
    single file's configuration, which counts after the file's own.
    """
    parts = [(part, FEW_STEP_LORAS) for name in loras for part in _lora_parts(name)]
    parts += [(_parts(name)[-1], FEW_STEP_MODELS) for name in (model, config) if name]
    for part, table in parts:
        for pattern, found in table:
            if pattern.search(part):
                return found
    return None


def _lora_parts(name: str) -> list[str]:
    file, *folders = reversed(_parts(name))
    says_itself = Path(name).exists() and Path(name).stem != _ANY_LORA
    return [file] if says_itself else [file, *folders[:1]]


def _parts(name: str) -> list[str]:
    return re.sub("[_.]", "-", name.rstrip("/").lower()).split("/")
