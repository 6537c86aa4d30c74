"""From a spec to the generator it names."""

from pcm.errors import InputError
from pcm.generation.drawing import TextToImage
from pcm.generation.names import UNDRAWN
from pcm.generation.null_generator import NullTextToImage
from pcm.spec import GeneratorSpec


def load_generator(spec: GeneratorSpec) -> TextToImage:
    """The generator a spec names: diffusers, or the null generator that measures the pipeline itself.

    Raises InputError for pictures that came from elsewhere.
    """
    if job := UNDRAWN.get(spec.model):
        raise InputError(
            f"generator {spec.model!r}: the pictures of this dataset were imported, so none can be drawn again or "
            f"added; rerun {job}, or generate into another --out"
        )
    if spec.model == "null":
        return NullTextToImage(spec)
    from pcm.generation.diffusers_pipeline import DiffusersTextToImage  # seconds to import, and null needs none of it

    return DiffusersTextToImage(spec)
