"""The faults of faulty_generators.py in a real diffusers pipeline."""

from faulty_generators import Faults

from cluster.stages.draw import DrawShard
from pcm.diffusers_generator import DiffusersTextToImage
from pcm.spec import GeneratorSpec
from pcm.text_to_image import TextToImage


class FaultyTextToImage(Faults, DiffusersTextToImage):
    pass


class DrawFaultyPipeline(DrawShard):
    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        return FaultyTextToImage(spec)
