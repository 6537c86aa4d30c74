"""Presets of `jobs.generate`: argument values by name. An argument that is given wins over the preset's.

Both regenerate a part of SynthImgCap (arXiv 2501.00437): one picture for every caption of the Karpathy train split, in
the file's order; `jobs.export --to official` then numbers them 6000000, 6000001, ... in that order.

What is published: the pictures' ids and format, the feature grids, "Stable Diffusion". What is not: its version, steps,
guidance, scheduler, seeds, and which captions were used. So these are ours, stated here and recorded in every dataset:

- Stable Diffusion 1.5 (`stable-diffusion-v1-5/stable-diffusion-v1-5`, the mirror of the withdrawn runwayml repository)
  at one commit, 512x512, the size that it was trained at.
- DPM-Solver++ (2M), 20 steps: its authors report good guided samples in 15 to 20 (arXiv 2211.01095); 50 steps of the
  model's own scheduler cost 2.5 times as much.
- Guidance 7.5: the default with which diffusers runs Stable Diffusion.
- ViT-L/14 features, 2x2-pooled to 64 patches of 1,024; `--clip ViT-B-32/openai` for the 49 of 768.
- Concepts: every published configuration, Flickr30k's too, reads one file of 446 nouns of COCO's captions (its name,
  coco400_embeddings_*, says 400). Without `--concepts FILE` a dataset has its own captions' 400 most frequent nouns.
- The model's own safety checker stays on: a picture that it blanks is drawn again with the next seeds, and quarantined
  as nsfw_flagged in the end.

Captions: `--split train` takes restval too, as the captioning literature does: 113,287 COCO photos with about five
captions each. The published COCO set holds 542,401 pairs and Flickr30k's 144,541, somewhat fewer than the split has
captions; how they were chosen is not published, so every caption is drawn, and a picture's number is not the number
that the same caption has there.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from cluster.generation.drawing_fields import DRAWING_FIELDS
from cluster.options import Request
from pcm.errors import not_known

AnyRequest = TypeVar("AnyRequest", bound=Request)

_STABLE_DIFFUSION = {
    "t2i": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "t2i_revision": "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
    "width": 512,
    "height": 512,
    "steps": 20,
    "guidance_scale": 7.5,
    "scheduler": "DPMSolverMultistepScheduler",
    "clip": "ViT-L-14/openai",
    "shard_size": 256,
}


@dataclass(frozen=True)
class GenerationPreset:
    """What `--preset NAME` stands for: values of arguments that were not given."""

    description: str
    arguments: dict[str, Any]


GENERATION_PRESETS = {
    "synthimgcap_coco": GenerationPreset(
        "SynthImgCap's COCO part, of the Karpathy file; with --concepts, the published 446 nouns",
        {**_STABLE_DIFFUSION, "corpus": "dataset_coco.json"},
    ),
    "synthimgcap_flickr30k": GenerationPreset(
        "SynthImgCap's Flickr30k part, of the Karpathy file; with --concepts, the published 446 nouns of COCO",
        {**_STABLE_DIFFUSION, "corpus": "dataset_flickr30k.json"},
    ),
}


def with_preset(request: AnyRequest, name: str | None) -> AnyRequest:
    """The request, what was not given (None) as the preset has it. Raises InputError for an unknown name."""
    if name is None:
        return request
    if name not in GENERATION_PRESETS:
        raise not_known("preset", name, GENERATION_PRESETS)
    asked: Any = request
    values = dict(GENERATION_PRESETS[name].arguments)
    if asked.t2i not in (None, values["t2i"]):
        del values["t2i_revision"]  # of another repository
    if asked.t2i == "null":
        values = {field: value for field, value in values.items() if field not in DRAWING_FIELDS}
    return replace(request, **{field: value for field, value in values.items() if getattr(request, field) is None})
