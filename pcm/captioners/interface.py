"""What a captioning method brings, and what evaluation, `pcm.Captioner` and most of training ask of it.

A new method is a folder beside `pcmnet/` with a torch module of plain torch, and an object as described here that
`pcm.captioners.methods` lists. Its randomness in training needs no care: on CPUs the engine gives every row
its own (pcm.kernels.row_randomness), whatever the module is made of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from torch import Tensor, nn

if TYPE_CHECKING:
    from pcm.text.concepts import ConceptVocabulary
    from pcm.text.vocabulary import Vocabulary

Network = TypeVar("Network", bound=nn.Module)

#: Files of a checkpoint folder. config.json: {"captioner": the method's name, "model": its config, "clip": ..., ...}.
CONFIG_FILE = "config.json"
#: In the config.json of a run: the CLIP that its command line named, or null. What is trusted of it stands in
#: `Captioner.load`.
CLIP_OPTION = "clip_option"
MODEL_FILE = "model.safetensors"
VOCABULARY_FILE = "vocabulary.txt"
CONCEPTS_FILE = "concepts.safetensors"


@dataclass(frozen=True)
class Decoded:
    """Captions as ids: words, then 0 (the end) and zeros. A hypothesis may also fill all T positions without an end."""

    #: (B, T) int64, or (B, out_size, T), best first, where out_size > 1.
    token_ids: Tensor
    #: float32, the same shape: log-probability of each word and of the end. Their sum is the hypothesis' score. What
    #: stands after the end is 0, or of no meaning.
    log_probs: Tensor


class CaptioningMethod(Protocol[Network]):
    """A captioning method; it has no state of its own, the weights are the network's."""

    @property
    def name(self) -> str:
        """By which config.json knows it."""

    @property
    def files(self) -> tuple[str, ...]:
        """Those that its checkpoint folders hold. MODEL_FILE is one: by it a folder is known to hold a captioner."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """What the network reads of a training batch (cluster.training.data.batches.Batch), besides targets and
        clip_score, in the order of its arguments.
        """

    def load(
        self, folder: Path, document: Mapping[str, Any], *, concepts: "ConceptVocabulary | None" = None
    ) -> Network:
        """The network in a checkpoint folder whose config.json holds `document`, with these concepts in place of the
        folder's. Raises InputError.
        """

    def encode(
        self, captions: Sequence[str], vocabulary: "Vocabulary", *, length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Captions as token_ids and target_ids, both int64 (n, length); targets are padded with -1."""

    def words(self, network: nn.Module, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of a batch in training, and their targets (B, T). `network` may be wrapped (DDP)."""

    def decode(
        self,
        network: Network,
        global_feature: Tensor,
        patch_features: Tensor,
        *,
        beam_size: int,
        others: Sequence[Network] = (),
    ) -> Decoded:
        """The best caption of each picture, (B, D) and (B, N, D_v); beam_size 1 is greedy search. `others`: networks
        that vote on each word too.
        """

    def salient(
        self, network: Network, global_feature: Tensor, patch_features: Tensor
    ) -> list[list[tuple[int, float]]]:
        """Of each picture the concepts that the network found there: (number, probability), most probable first. None
        where the method looks for none.
        """
