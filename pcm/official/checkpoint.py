"""Published captioners - a .pth, a vocabulary, a concept pickle - to our checkpoint folder and back."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from pcm.captioners.captioner import CONCEPTS_FILE, CONFIG_FILE, MODEL_FILE, VOCABULARY_FILE, captioner_files
from pcm.captioners.pcmnet.model import PCMNet
from pcm.errors import InputError, one_line
from pcm.official.files import checkpoint_to_pth, concepts_to_pickle
from pcm.official.settings import check_settings
from pcm.official.state_dict import config_from_state, from_official, read_tensors, to_official
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary

#: What an exported checkpoint is made of.
OFFICIAL_MODEL_FILE = "model.pth"
OFFICIAL_CONCEPTS_FILE = "concepts.pickle"


def import_checkpoint(
    path: str | Path,
    *,
    vocabulary: Vocabulary,
    concepts: ConceptVocabulary,
    clip: dict[str, str],
    settings: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """The files of our checkpoint folder, in the order in which they are to be written.

    path: .pth (read without executing anything) or .safetensors. clip: {"model", "dtype"} that made the features.
    settings: fields of PCMNetConfig that a checkpoint does not show (`SETTINGS`), such as top_concepts. Raises
    InputError when a file is unreadable, unsafe or no PCM-Net, or when the parts do not belong together.
    """
    tensors = read_tensors(path)
    check_settings(settings or {})
    try:
        config = config_from_state(tensors, num_concepts=len(concepts), **(settings or {}))
    except TypeError as error:
        raise InputError(f"settings {settings}: {error}") from None
    sizes = {
        "words": (config.vocab_size, len(vocabulary)),
        "dimensions of the concepts": (config.embed_dim, concepts.embeddings.shape[1]),
    }
    for what, (wanted, given) in sizes.items():
        if wanted != given:
            raise InputError(f"{path}: is for {wanted} {what}, given are {given}; give the files of the same run")
    model = PCMNet(config)
    model.set_concepts(torch.from_numpy(concepts.embeddings))
    try:
        model.load_state_dict(from_official(tensors))
    except RuntimeError as error:  # a tensor of another shape
        raise InputError(f"{path}: {one_line(error, longest=300)}") from None
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return captioner_files(
        model,
        document={"clip": clip, "imported": {"sha256": digest}},
        vocabulary=vocabulary.to_text().encode(),
        concepts=concepts.to_bytes(),
    )


def export_checkpoint(folder: Path) -> dict[str, bytes]:
    """Published files of one of our checkpoint folders: model.pth, vocabulary.txt, concepts.pickle.

    Raises InputError when a file of the folder is missing or unreadable.
    """
    missing = [n for n in (CONFIG_FILE, MODEL_FILE, VOCABULARY_FILE, CONCEPTS_FILE) if not (folder / n).is_file()]
    if missing:
        raise InputError(f"checkpoint {folder}: {', '.join(missing)} missing; give a complete checkpoint folder")
    return {
        VOCABULARY_FILE: Vocabulary.load(folder / VOCABULARY_FILE).to_text().encode(),
        OFFICIAL_CONCEPTS_FILE: concepts_to_pickle(ConceptVocabulary.load(folder / CONCEPTS_FILE)),
        OFFICIAL_MODEL_FILE: checkpoint_to_pth(to_official(read_tensors(folder / MODEL_FILE))),
    }
