"""PCM-Net as a captioning method: see pcm.captioners.interface."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from pcm.captioners.interface import CONCEPTS_FILE, CONFIG_FILE, MODEL_FILE, VOCABULARY_FILE, Decoded
from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.captioners.pcmnet.decoding import beam_search
from pcm.captioners.pcmnet.model import PCMNet
from pcm.documents import typed_fields
from pcm.errors import InputError, one_line
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary


class PCMNetMethod:
    name = "pcmnet"
    files = (VOCABULARY_FILE, CONCEPTS_FILE, MODEL_FILE, CONFIG_FILE)
    inputs = ("global_feature", "patch_features", "token_ids")

    def load(self, folder: Path, document: Mapping[str, Any], *, concepts: ConceptVocabulary | None = None) -> PCMNet:
        try:
            fields = typed_fields(PCMNetConfig, document["model"], "model", why="not known to this release")
            config = PCMNetConfig(**fields)
        except InputError as error:
            raise InputError(f"{folder / CONFIG_FILE}: {error}") from None
        if concepts is None:
            concepts = ConceptVocabulary.load(folder / CONCEPTS_FILE)
        else:
            config = replace(config, num_concepts=len(concepts))
        model = PCMNet(config)
        model.set_concepts(torch.from_numpy(concepts.embeddings))
        try:
            model.load_state_dict(safetensors.torch.load_file(folder / MODEL_FILE))
        except (SafetensorError, RuntimeError) as error:
            reason = one_line(error, longest=300)
            raise InputError(f"{folder / MODEL_FILE}: does not fit its {CONFIG_FILE} ({reason})") from None
        return model

    def encode(self, captions: Sequence[str], vocabulary: Vocabulary, *, length: int) -> tuple[np.ndarray, np.ndarray]:
        return vocabulary.encode_all(captions, length)

    def words(self, network: nn.Module, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return network(*(rows[name] for name in self.inputs)), rows["target_ids"]

    def decode(
        self,
        network: PCMNet,
        global_feature: Tensor,
        patch_features: Tensor,
        *,
        beam_size: int,
        others: Sequence[PCMNet] = (),
    ) -> Decoded:
        return beam_search(network, global_feature, patch_features, beam_size=beam_size, others=others)

    def salient(self, network: PCMNet, global_feature: Tensor, patch_features: Tensor) -> list[list[tuple[int, float]]]:
        """Those that the mix-up retrieves (top K above the threshold), with eq. 1's softmax."""
        found = network.find_pairs(global_feature, patch_features)
        rows = zip(found.top_concepts.tolist(), found.top_probabilities.tolist(), found.kept.tolist(), strict=True)
        return [[(number, p) for number, p, kept in zip(*row, strict=True) if kept] for row in rows]


PCMNET = PCMNetMethod()
