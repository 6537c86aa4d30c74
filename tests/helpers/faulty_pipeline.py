"""The faults of faulty_generators.py in a real diffusers pipeline."""

from cluster.generation.stages.draw import DrawShard
from pcm.generation.diffusers_pipeline import DiffusersTextToImage
from pcm.generation.drawing import TextToImage
from pcm.spec import GeneratorSpec
from tests.helpers.faulty_generators import Faults


class FaultyTextToImage(Faults, DiffusersTextToImage):
    pass


class DrawFaultyPipeline(DrawShard):
    @staticmethod
    def load(spec: GeneratorSpec) -> TextToImage:
        return FaultyTextToImage(spec)
