"""A trained captioner: pictures in, captions and their salient concepts out. No Ray, no cluster, one folder on disk."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from pcm.captioners.interface import (
    CLIP_OPTION,
    CONCEPTS_FILE,
    CONFIG_FILE,
    MODEL_FILE,
    VOCABULARY_FILE,
    CaptioningMethod,
)
from pcm.captioners.methods import METHODS
from pcm.captioners.pcmnet.config import BEAM_SIZE
from pcm.captioners.pcmnet.decoding import EOS
from pcm.captioners.pcmnet.method import PCMNET
from pcm.captioners.pcmnet.model import PCMNet
from pcm.clip.encoder import ClipEncoder, ImageFeatures
from pcm.clip.names import clip_anywhere, refuse_place, revision_here
from pcm.documents import document_bytes, read_document
from pcm.errors import InputError, first_line
from pcm.images import open_image
from pcm.kernels.packed_linear import for_decoding
from pcm.model_faults import room_for_model
from pcm.precision import whole_float32
from pcm.records import FeatureShape
from pcm.spec import DIGEST, QUICK_GELU_SUFFIX
from pcm.text.concepts import ConceptVocabulary
from pcm.text.vocabulary import Vocabulary

#: Pictures captioned together, fewer where they are large: a batch is closed at this many pixels (3 bytes each). With
#: beam 3, 64 pictures are 192 rows a step: on a CPU, matrix products of half as many rows are a quarter slower.
BATCH_SIZE = 64
BATCH_PIXELS = 128_000_000

_Picture = Image.Image | str | os.PathLike[str] | bytes | BinaryIO

UNRECORDED_ACTIVATION = (
    "checkpoint %s: does not say which activation its CLIP had when it was trained; assumed is quick_gelu, which the "
    "weights of %s need (before version 0.2.0 it was gelu, and such a captioner should be trained again). To state it, "
    'write "activation": "quick_gelu" or "gelu" under "clip" in its config.json'
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionResult:
    """What was found for one picture: a caption, or one line that says why there is none."""

    caption: str
    concepts: tuple[tuple[str, float], ...]  # (name, probability), most probable first: eq. 1's softmax
    log_prob: float  # summed over the words and the end
    error: str = ""


class Captioner:
    """A PCM-Net with its vocabulary, concepts and CLIP.

        captioner = Captioner.load("run/best")
        for result in captioner.caption(["street.jpg", pil_image]):
            print(result.error or result.caption)

    The CLIP may be given as a function that loads it: it is called when the first picture comes, and never where
    features are described. `others`: more networks, whose word probabilities are averaged with the model's.
    `recorded`: activation and weights (a sha256) of the CLIP that it was trained with, where they are known. `method`:
    the captioning method that the networks are of.

    Raises InputError when the CLIP's feature sizes are not those the network was trained on.
    """

    def __init__(
        self,
        model: PCMNet,
        *,
        vocabulary: Vocabulary,
        concepts: ConceptVocabulary,
        clip: ClipEncoder | Callable[[], ClipEncoder],
        beam_size: int = BEAM_SIZE,
        others: Sequence[PCMNet] = (),
        recorded: Mapping[str, str | None] | None = None,
        method: CaptioningMethod = PCMNET,
    ) -> None:
        if len(vocabulary) != model.config.vocab_size:
            raise InputError(
                f"vocabulary of {len(vocabulary)} words: the captioner was trained with {model.config.vocab_size}; "
                "give the vocabulary of its dataset"
            )
        self.model = model.eval()
        self.others = [other.eval() for other in others]
        self.vocabulary = vocabulary
        self.concepts = concepts
        self.beam_size = beam_size
        self.recorded = recorded or {}
        self._method = method
        self._clip = clip
        if isinstance(clip, ClipEncoder):
            self._check_sizes(clip)

    @property
    def clip(self) -> ClipEncoder:
        """The CLIP, loaded when it is first asked for. Raises InputError when it cannot be, or does not fit."""
        if not isinstance(self._clip, ClipEncoder):
            loaded = self._clip()
            self._check_sizes(loaded)
            self._clip = loaded
        return self._clip

    @property
    def features(self) -> FeatureShape:
        """The shape of the features that the network takes."""
        config = self.model.config
        return FeatureShape(config.embed_dim, config.patch_dim, config.num_patches)

    def _check_sizes(self, clip: ClipEncoder) -> None:
        wanted = tuple(vars(self.features).values())
        given = (clip.embed_dim, clip.patch_dim, clip.num_patches)
        if wanted != given:
            raise InputError(
                f"CLIP {clip.name!r}: its features (D, D_v, N) are {given}, the captioner was trained on {wanted}; "
                "give the CLIP of the training data"
            )

    @classmethod
    def load(
        cls,
        path: str | Path | Sequence[str | Path],
        *,
        clip: ClipEncoder | str | None = None,
        device: str = "auto",
        beam_size: int = BEAM_SIZE,
        concepts: ConceptVocabulary | None = None,
        find_clip: Callable[[str, str | None], str] | None = None,
    ) -> Self:
        """The captioner in a checkpoint folder (a run's own folder means its `best`), or an ensemble of several.

        `clip` replaces the encoder that the checkpoint names, such as a folder that has moved, `concepts` those beside
        it. `find_clip` says where a CLIP (its name, the revision that was recorded) is on this machine, where that is
        elsewhere. The CLIP is loaded when the first picture comes. A checkpoint alone may name only a CLIP that
        is known here; a folder, file or hub repo must be named by `clip` or by the record of the run that the
        checkpoint lies in.
        Raises InputError when files are missing or do not belong together, and when the recorded CLIP has other files
        now. Where those of `clip` are others, the log says so.
        """
        whole_float32()
        folders = [checkpoint_folder(Path(each)) for each in ([path] if isinstance(path, (str, Path)) else path)]
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        documents = [_read_config(folder) for folder in folders]
        folder, document = folders[0], documents[0]
        for other, its in zip(folders[1:], documents[1:], strict=True):
            _check_same_kind(folder, document, other, its)
        method = _method(folder, document)  # that of the others, too
        models = [
            method.load(each, its, concepts=concepts).to(device) for each, its in zip(folders, documents, strict=True)
        ]
        trained_on = document["clip"]
        recorded = {name: trained_on.get(name) for name in ("activation", "weights")}
        if isinstance(clip, ClipEncoder):
            clip.check_recorded(**recorded)

        named_by_run = _clip_of_run(folder)  # read now: the folder may be a copy that does not stay

        def load_clip() -> ClipEncoder:
            name = clip or trained_on["model"]
            assert isinstance(name, str)
            if not clip and name != named_by_run:
                refuse_place(name, source=str(folder / CONFIG_FILE))
            is_recorded = clip_anywhere(name) == clip_anywhere(trained_on["model"])
            revision = trained_on.get("revision") if is_recorded else None
            place = find_clip(name, revision) if find_clip else name
            pinned = trained_on.get("revision") or ""
            was_compared = is_recorded and place != name  # by find_clip
            now = revision_here(place, pinned) if pinned.startswith(DIGEST) and not was_compared else None
            if now and now != pinned:
                mend = "install the release that trained it" if name == "embedded" else "put the same files there"
                said = f"its files are {now}, but the captioner {folder} was trained with {pinned}; {mend}"
                if not clip:
                    raise InputError(f"CLIP {name!r}: {said}, or take these with --clip {name}")
                log.warning("--clip %s: %s, unless you mean these", name, said)
            # Nobody stores these features: one picture need not cost a batch of 32, nor on a CPU bfloat16, which there
            # takes six times as long.
            dtype = "float32" if device == "cpu" else trained_on["dtype"]
            with room_for_model(f"CLIP {name}", device):
                found = ClipEncoder(place, device=device, dtype=dtype, revision=revision, exact=False, **recorded)
            own = name.partition("/")[0].endswith(QUICK_GELU_SUFFIX)  # then it was quick_gelu before, too
            if recorded["activation"] is None and found.activation == "quick_gelu" and not own:
                log.warning(UNRECORDED_ACTIVATION, folder, name)
            return found

        return cls(
            models[0],
            others=models[1:],
            vocabulary=Vocabulary.load(folder / VOCABULARY_FILE),
            concepts=concepts or ConceptVocabulary.load(folder / CONCEPTS_FILE),
            clip=clip if isinstance(clip, ClipEncoder) else load_clip,
            beam_size=beam_size,
            recorded=recorded,
            method=method,
        )

    def caption(self, images: _Picture | Sequence[_Picture]) -> list[CaptionResult]:
        """One result a picture, in order; a picture alone is a list of one. A file that is missing, corrupt, truncated
        or over `pcm.images.MAX_PIXELS`, and what is no PIL picture, path, bytes or opened file, gives a result with
        `error`; the others are captioned all the same.
        """
        results: list[CaptionResult] = []
        several = cast(Sequence[_Picture], [images] if _is_picture(images) else images)
        for opened in _opened(several):
            readable = [picture for picture in opened if isinstance(picture, Image.Image)]
            captioned = iter(self.describe(self.clip.encode_images(readable)) if readable else [])
            results.extend(
                next(captioned) if isinstance(picture, Image.Image) else CaptionResult("", (), 0.0, picture)
                for picture in opened
            )
        return results

    def describe(self, features: ImageFeatures) -> list[CaptionResult]:
        """One result for each picture whose CLIP features are given."""
        captions = decode_captions(
            self.model,
            self.vocabulary,
            features.global_feature,
            features.patch_features,
            beam_size=self.beam_size,
            others=self.others,
            method=self._method,
        )
        concepts = self.salient_concepts(features)
        return [
            CaptionResult(caption, found, log_prob)
            for (caption, log_prob), found in zip(captions, concepts, strict=True)
        ]

    @torch.inference_mode()
    def salient_concepts(self, features: ImageFeatures) -> list[tuple[tuple[str, float], ...]]:
        """(name, probability) of the concepts that the captioner finds in each picture, most probable first."""
        found = self._method.salient(
            self.model, *_on_device(self.model, features.global_feature, features.patch_features)
        )
        return [tuple((self.concepts.names[number], p) for number, p in each) for each in found]


@torch.inference_mode()
def decode_captions(
    model: PCMNet,
    vocabulary: Vocabulary,
    global_feature: np.ndarray,
    patch_features: np.ndarray,
    *,
    beam_size: int,
    batch_size: int = BATCH_SIZE,
    others: Sequence[PCMNet] = (),
    method: CaptioningMethod = PCMNET,
) -> list[tuple[str, float]]:
    """(caption, summed log-probability) of each picture; beam_size 1 is greedy search. The model is in eval mode.

    global_feature (n, D) and patch_features (n, N, D_v) of any float type. `others`, `method`: see Captioner.
    """
    rows = min(batch_size, len(global_feature)) * beam_size
    network, *voters = (for_decoding(each, rows=rows) for each in (model, *others))
    decoded: list[tuple[str, float]] = []
    for start in range(0, len(global_feature), batch_size):
        part = slice(start, start + batch_size)
        images, patches = _on_device(model, global_feature[part], patch_features[part])
        found = method.decode(network, images, patches, beam_size=beam_size, others=voters)
        after_end = (found.token_ids == EOS).cumsum(dim=-1) > 1  # greedy search goes on there, for the others' sake
        log_probs = found.log_probs.masked_fill(after_end, 0.0).sum(dim=-1).tolist()
        token_ids = found.token_ids.tolist()
        decoded.extend((vocabulary.decode(ids), log_prob) for ids, log_prob in zip(token_ids, log_probs, strict=True))
    return decoded


def _on_device(model: PCMNet, *arrays: np.ndarray) -> list[torch.Tensor]:
    device = next(model.parameters()).device
    return [torch.from_numpy(array).to(device).float() for array in arrays]


def captioner_files(model: PCMNet, *, document: dict[str, Any], vocabulary: bytes, concepts: bytes) -> dict[str, bytes]:
    """The files of a checkpoint folder, to be written in this order: what Captioner.load reads.

    `document` becomes config.json; it must hold "clip": {"model", "dtype"} and is completed with the network's sizes.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    config = {**document, "captioner": PCMNET.name, "model": asdict(model.config)}
    return {
        VOCABULARY_FILE: vocabulary,
        CONCEPTS_FILE: concepts,
        MODEL_FILE: safetensors.torch.save(state),
        CONFIG_FILE: document_bytes(config),
    }


def checkpoint_folder(path: Path) -> Path:
    """The folder that holds the captioner: `path` itself or, for a run's folder, `path/best`."""
    for folder in (path, path / "best"):
        if (folder / MODEL_FILE).is_file():
            is_known = (folder / CONFIG_FILE).is_file()
            files = _method(folder, _read_config(folder)).files if is_known else PCMNET.files
            missing = [name for name in files if not (folder / name).is_file()]
            if missing:
                raise InputError(
                    f"checkpoint {folder}: {', '.join(missing)} missing; give a complete checkpoint folder"
                )
            return folder
    raise no_captioner(path)


def no_captioner(place: str | Path) -> InputError:
    """The line about a place where no captioner lies."""
    return InputError(f"checkpoint {place}: no {MODEL_FILE} in it or in its best/; give a folder that jobs.train wrote")


def _check_same_kind(first: Path, document: dict[str, Any], other: Path, its: dict[str, Any]) -> None:
    """Raises InputError unless two checkpoints may vote on one word: same method, words, features and CLIP."""
    sizes = ("vocab_size", "embed_dim", "patch_dim", "num_patches")
    clips = [{name: each["clip"].get(name) for name in ("model", "activation", "weights")} for each in (document, its)]
    differences = {
        "vocabulary": (first / VOCABULARY_FILE).read_bytes() != (other / VOCABULARY_FILE).read_bytes(),
        "captioner": document.get("captioner", PCMNET.name) != its.get("captioner", PCMNET.name),
        "feature sizes": any(document["model"].get(name) != its["model"].get(name) for name in sizes),
        "CLIP": clips[0] != clips[1],
    }
    if different := [name for name, is_so in differences.items() if is_so]:
        raise InputError(
            f"checkpoint {other}: another {', '.join(different)} than {first}; "
            "an ensemble needs captioners of one dataset"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint. Raises InputError where it is damaged."""
    try:
        document = read_document((folder / CONFIG_FILE).read_bytes())
        clip, model = document["clip"], document["model"]
        if not (isinstance(clip["dtype"], str) and isinstance(clip["model"], str)):
            raise TypeError(f"clip {clip!r}: names no model and dtype")
        if not isinstance(model, dict):
            raise TypeError(f"model {model!r}: must be an object of field: value")
        return document
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(f"{folder / CONFIG_FILE}: damaged ({first_line(error)}); give another checkpoint") from None


def _run_record(folder: Path) -> Path | None:
    """config.json of the run that a checkpoint's folder lies in (`best/` or `checkpoints/NAME`), where there is one."""
    places = (folder.resolve().parent / CONFIG_FILE, folder.resolve().parent.parent / CONFIG_FILE)
    return next((place for place in places if place.is_file()), None)


def _clip_of_run(folder: Path) -> str | None:
    """The CLIP that the command line of the run named (CLIP_OPTION of its record); None where it named none."""
    record = _run_record(folder)
    try:
        return read_document(record.read_bytes())[CLIP_OPTION] if record else None
    except (ValueError, LookupError, TypeError):
        return None


def _method(folder: Path, document: dict[str, Any]) -> CaptioningMethod[PCMNet]:
    name = document.get("captioner", PCMNET.name)
    if not isinstance(name, str) or name not in METHODS:
        raise InputError(
            f"{folder / CONFIG_FILE}: captioner {name!r} is not known here; known are {', '.join(sorted(METHODS))}"
        )
    return METHODS[name]


def _is_picture(given: object) -> bool:
    """Whether a picture can be in it; an opened file, such as an upload, is anything that can be read from."""
    return isinstance(given, (Image.Image, str, os.PathLike, bytes)) or hasattr(given, "read")


def _opened(images: Sequence[_Picture]) -> Iterator[list[Image.Image | str]]:
    """Batches of pictures; one that cannot be opened is replaced by the line that says why."""
    batch: list[Image.Image | str] = []
    pixels = 0
    for number, image in enumerate(images):
        try:
            if not _is_picture(image):
                kind = type(image).__name__
                raise InputError(f"picture {number} is a {kind}; give a PIL picture, a path, bytes or an opened file")
            picture = image if isinstance(image, Image.Image) else open_image(image)
            pixels += picture.width * picture.height
            batch.append(picture)
        except InputError as error:
            batch.append(str(error))
        if len(batch) == BATCH_SIZE or pixels >= BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch
