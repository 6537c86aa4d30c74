"""The captioning methods there are, by name: a new one is a folder beside `pcmnet/` and a line here."""

from pcm.captioners.interface import CaptioningMethod
from pcm.captioners.pcmnet.method import PCMNET
from pcm.captioners.pcmnet.model import PCMNet

#: By the name in config.json; a checkpoint without one is a PCM-Net's.
METHODS: dict[str, CaptioningMethod[PCMNet]] = {PCMNET.name: PCMNET}
