"""The seed of every picture: a function of the spec and the caption's own id, and of nothing else.

Neighbours in the corpus, worker count and order of work play no part, and neither do the options that are there for
speed alone: pictures made with and without them can be compared.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as json_string

from pcm.spec import LATER_FIELDS, DatasetSpec, GeneratorSpec

#: Fields of GeneratorSpec that no seed depends on.
SPEED_FIELDS = ("attention", "channels_last", "compile", "vae_slicing", "vae_tiling", "prompt_cache", "offload")
#: Fields younger than the first datasets: at their default they are left out, so that those keep their seeds.
_LATER_FIELDS = ("scheduler_options", *LATER_FIELDS)


def sample_seed(spec: DatasetSpec, corpus_id: str, image_index: int) -> int:
    """Seed of the first attempt at picture `image_index` of a caption.

    In [0, 2**53): exact as a JSON number and in an int64 column. Hashes the caption's corpus id, the picture's index,
    the picture-deciding part of the spec and the spec's own seed.
    """
    key = json.dumps([_pictures_digest(spec.generator, spec.seed, spec.generator_version), corpus_id, image_index])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 11


def sample_seeds(spec: DatasetSpec, corpus_ids: Sequence[str]) -> list[int]:
    """`sample_seed` of every picture of these captions, in order: the same numbers, faster."""
    start = hashlib.sha256(f'["{_pictures_digest(spec.generator, spec.seed, spec.generator_version)}", '.encode())
    endings = [f", {image_index}]".encode() for image_index in range(spec.images_per_caption)]
    seeds = []
    for corpus_id in corpus_ids:
        caption = start.copy()
        caption.update(json_string(corpus_id).encode())
        for ending in endings:
            key = caption.copy()
            key.update(ending)
            seeds.append(int.from_bytes(key.digest()[:8], "big") >> 11)
    return seeds


def attempt_seed(seed: int, attempt: int) -> int:
    """Seed of attempt 0, 1, 2, ... at a sample whose first seed is `seed`: a defective picture is drawn again so."""
    return seed + attempt


#: Seeds of redraws begin here; those of a dataset's own samples lie below 2**53, their further attempts a few above.
_REDRAWS = 2**54
#: Between the seeds of two redraws of a sample: more than --max-attempts may be, and odd.
REDRAW_STEP = 4099


def redraw_id(sample_id: str, seed: int, attempt: int) -> str:
    """What redraw 1, 2, ... of a sample is called whose stored picture has `seed`: "000000123-00/81985529216+1"."""
    return f"{sample_id}/{seed}+{attempt}"


def redraw_seed(redraw_id: str, caption: str) -> int:
    """Seed of a redraw: 2**54 + 53 bits of the sha256 of ["redraw", SAMPLE_ID/SEED, caption] + 4099 * (attempt - 1).

    So it never meets the seed of a dataset's own sample or of its further attempts (`sample_seed`, `attempt_seed`), of
    this or another picture of the caption: they are smaller. And a defective redraw, which is tried again with the next
    seeds, never meets another redraw of its sample: it has fewer than REDRAW_STEP attempts. Raises ValueError for
    another id than `redraw_id` gives.
    """
    redrawn, _, attempt = redraw_id.rpartition("+")
    key = json.dumps(["redraw", redrawn, caption])
    digest = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 11
    return _REDRAWS + digest + REDRAW_STEP * (int(attempt) - 1)


@functools.lru_cache(maxsize=8)
def _pictures_digest(generator: GeneratorSpec, seed: int, version: int) -> str:
    if version > 1:
        generator = generator.without_places()
    defaults = {entry.name: entry.default for entry in dataclasses.fields(generator)}
    deciding = {
        name: value
        for name, value in dataclasses.asdict(generator).items()
        if name not in SPEED_FIELDS and not (name in _LATER_FIELDS and value == defaults[name])
    }
    return hashlib.sha256(json.dumps([deciding, seed], sort_keys=True).encode()).hexdigest()
