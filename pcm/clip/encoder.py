"""The frozen CLIP: scores a picture against its caption and gives the features that captioners read.

Any open_clip model. Feature conventions are the paper's section 3.1 and the published features: `patch_features` are
the last block's tokens before the last norm and projection; a grid larger than 8x8 with even sides is 2x2
average-pooled (ViT-L/14: 16x16 -> 64 patches; ViT-B/16: 14x14 -> 49). pcm/clip/towers.py says which towers have them.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from pcm.clip.names import revision_here
from pcm.clip.truncation import count_tokens
from pcm.errors import InputError
from pcm.images import to_uint8
from pcm.model_faults import is_out_of_memory, is_sticky, why_unusable
from pcm.precision import whole_float32
from pcm.records import FeatureShape
from pcm.spec import ClipSpec

#: Batches smaller than `batch_size` that cost less. On a CPU in float32 with one thread they give the same bytes as 32;
#: 1 and 2 do not, nor does any of a SigLIP with two threads. On a GPU another shape may take other kernels.
SMALL_BATCHES = (4, 8, 16)

#: Threads that open and preprocess pictures beside the model.
PREPROCESSING_THREADS = 4

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ImageFeatures:
    """global_feature (B, D) float32, L2-normalised; patch_features (B, N, D_v) float32, zeros (B, 1, 1) of a tower
    without tokens.
    """

    global_feature: np.ndarray
    patch_features: np.ndarray


class ClipEncoder:
    """An open_clip model as a feature extractor.

    `name` is "architecture/pretrained" (`ViT-L-14/openai`; `pretrained` may be a checkpoint file), `hf-hub:org/repo`,
    a folder with open_clip_config.json and weights, or `embedded`. Batches are padded to a fixed shape, `batch_size` or
    one of SMALL_BATCHES that gives the same bytes, so that features do not depend on how many neighbours there were;
    `exact=False`, for features that nobody stores, takes small shapes where the last bits differ, too. `revision` is
    the commit of a hub repo, also of a tag's. `activation` and `weights` (a sha256) are what the features at hand were
    recorded with, where it is known. `compile`: a mode of torch.compile for the image tower.

    Raises InputError when the model cannot be found or is another than recorded.
    """

    def __init__(
        self,
        name: str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = ClipSpec.batch_size,
        revision: str | None = None,
        activation: str | None = None,
        weights: str | None = None,
        exact: bool = True,
        compile: str | None = None,
    ) -> None:
        # Three seconds to import, and whoever only names this class needs neither.
        import pcm.torchvision_shim  # noqa: F401  isort: skip
        import open_clip

        from pcm.clip.towers import feature_shape, image_features, token_grid
        from pcm.clip.weights import clip_files

        whole_float32()

        self.name = name
        self.device = torch.device(device)
        self.batch_size = batch_size
        self._exact = exact
        self._dtype = _DTYPES[dtype]
        try:
            files = clip_files(name, revision)
            self.activation = files.activation
            self.check_recorded(activation=activation)
            self._files = files
            self.check_recorded(weights=weights)
            model: Any = files.load(self.device)
            self._tokenizer = files.tokenizer()
            self.embed_dim: int = files.config["embed_dim"]
            self._preprocess = open_clip.transform.image_transform_v2(
                open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg), is_train=False
            )
        except InputError:
            raise
        except Exception as error:  # whatever a library says of files that are damaged or none
            if is_out_of_memory(error) or is_sticky(error):
                raise
            raise InputError(
                f"CLIP model {name!r} cannot be loaded: {why_unusable(error)}; get its files again if they may "
                "be damaged, or give ARCHITECTURE/PRETRAINED (see open_clip.list_pretrained()), a folder or 'embedded'"
            ) from error
        model.eval().requires_grad_(False)
        #: How the model turns a cosine into a logit: cosine * logit_scale, plus logit_bias of a SigLIP.
        self.logits: dict[str, float] = {"logit_scale": model.logit_scale.float().exp().item()}
        if getattr(model, "logit_bias", None) is not None:
            self.logits["logit_bias"] = model.logit_bias.float().item()
        self._model: Any = model.to(dtype=self._dtype)
        self._visual: Any = model.visual
        self.resolution: int = min(open_clip.transform.to_2tuple(self._visual.image_size))
        self.context_length: int = self._tokenizer.context_length
        self._grid = token_grid(self._visual)
        self._tower: Callable = partial(image_features, self._visual, self._grid)
        self._compiled = compile not in (None, "none")
        if self._compiled:
            from torch._inductor import config as inductor  # seconds to import, and few need it

            inductor.deterministic = True
            self._tower = torch.compile(self._tower, mode=compile, dynamic=False)
        self.features: FeatureShape = feature_shape(self.embed_dim, self._grid)
        self.patch_dim, self.num_patches = self.features.patch_dim, self.features.num_patches
        #: Patches that a row of the picture has, of the N that are row-major.
        self.patch_columns: int = self._grid.patch_columns if self._grid else 1

    @classmethod
    def from_spec(cls, spec: ClipSpec, *, model: str | None = None, device: str | None = None) -> "ClipEncoder":
        """The CLIP that a spec pins, in whatever process; `model` is where it is now, if it has moved.

        Raises InputError when a folder or file is no longer what was pinned.
        """
        pinned = spec.revision
        if model in (None, spec.model) and pinned.startswith("sha256:"):
            now = revision_here(spec.model, pinned)
            if now != pinned:
                raise InputError(
                    f"CLIP {spec.model!r}: its files are {now or 'not there'}, but {pinned} were pinned; put the same "
                    "files there, or begin another dataset"
                )
        return cls(
            model or spec.model,
            device=device or spec.device,
            dtype=spec.dtype,
            batch_size=spec.batch_size,
            revision=pinned,
            activation=spec.activation,
            weights=spec.weights,
            compile=spec.compile,
        )

    def check_recorded(self, *, activation: str | None = None, weights: str | None = None) -> None:
        """Raises InputError when the features at hand are recorded to be of another activation or other weights than
        this CLIP's. What was not recorded is not compared.
        """
        for what, recorded, mine in (
            ("activation", activation, self.activation),
            ("weights", weights, weights and self.weights),
        ):
            if recorded and mine and recorded != mine:
                raise InputError(
                    f"CLIP {self.name!r}: its {what} is {mine}, but the features at hand were made with {recorded}; "
                    "give the CLIP that made them, or featurise again"
                )

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image | Callable[[], Image.Image]]) -> ImageFeatures:
        """Features of PIL images of any size, or of what functions return that open them.

        The next batch is opened and preprocessed in threads while the model works on this one.
        """
        global_features, patch_features = [], []
        for pixel_values in self._preprocessed(images):  # (B, 3, H, W)
            given = self._on_device(self._padded(pixel_values)).to(self._dtype)
            features, tokens = self._tower(given)
            count = len(pixel_values)
            global_features.append(
                torch.nn.functional.normalize(features.float(), dim=-1)[:count].cpu().numpy()
            )  # (B, D)
            if tokens is None:
                patch_features.append(np.zeros((count, self.num_patches, self.patch_dim), np.float32))
            else:
                patch_features.append(tokens.flatten(2).transpose(1, 2)[:count].cpu().numpy())  # (B, N, D_v)
        if not images:
            return ImageFeatures(
                np.zeros((0, self.embed_dim), np.float32), np.zeros((0, self.num_patches, self.patch_dim), np.float32)
            )
        return ImageFeatures(np.concatenate(global_features), np.concatenate(patch_features))

    def _preprocessed(self, images: Sequence[Image.Image | Callable[[], Image.Image]]) -> Iterator[torch.Tensor]:
        with ThreadPoolExecutor(PREPROCESSING_THREADS, thread_name_prefix="preprocess") as pool:
            ahead: deque[list[Future[torch.Tensor]]] = deque()
            for start in range(0, len(images), self.batch_size):
                ahead.append([pool.submit(self._pixels, image) for image in images[start : start + self.batch_size]])
                if len(ahead) > 1:
                    yield torch.stack([pixels.result() for pixels in ahead.popleft()])
            for batch in ahead:
                yield torch.stack([pixels.result() for pixels in batch])

    def _pixels(self, image: Image.Image | Callable[[], Image.Image]) -> torch.Tensor:
        return self._preprocess((image() if callable(image) else image).convert("RGB"))  # (3, H, W)

    def seen(self, image: Image.Image) -> Image.Image:
        """The picture as the model sees it: scaled and cropped to `resolution`, so that the patches cover it evenly."""
        config = self._visual.preprocess_cfg
        mean, std = (torch.tensor(config[name]).reshape(3, 1, 1) for name in ("mean", "std"))
        pixels = (self._pixels(image) * std + mean).permute(1, 2, 0).numpy()  # (H, W, 3)
        return Image.fromarray(to_uint8(pixels), mode="RGB")

    @torch.inference_mode()
    def encode_texts(self, texts: list[str]) -> np.ndarray:
        """(B, D) float32, L2-normalised; texts longer than the context are truncated."""
        rows = []
        for start in range(0, len(texts), self.batch_size):
            batch = texts[start : start + self.batch_size]
            token_ids = self._on_device(self._padded(self._tokenizer(batch)))  # (B, context)
            features = torch.nn.functional.normalize(self._model.encode_text(token_ids).float(), dim=-1)
            rows.append(features[: len(batch)].cpu().numpy())
        return np.concatenate(rows) if rows else np.zeros((0, self.embed_dim), np.float32)

    def count_tokens(self, text: str) -> int:
        """CLIP tokens of `text` including start and end, before truncation."""
        return count_tokens(self._tokenizer, text)

    def head(self) -> dict[str, torch.Tensor]:
        """The head that PCM-Net applies to patches: ln_post.weight (D_v,), ln_post.bias (D_v,), proj (D_v, D); empty
        where the tower has none.
        """
        from pcm.clip.towers import token_head

        return token_head(self._visual)

    @cached_property
    def weights(self) -> str:
        """sha256 of the file of weights, as "sha256:...". Reads the file once."""
        from pcm.clip.weights import sha256_of

        return sha256_of(self._files.weights)

    def _on_device(self, batch: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True)

    def _padded(self, batch: torch.Tensor) -> torch.Tensor:
        size = next((size for size in self._small_batches() if size >= len(batch)), self.batch_size)
        missing = size - len(batch)
        return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing else batch

    def _small_batches(self) -> list[int]:
        if self._compiled:
            return []  # one shape is compiled
        one_thread = self.device.type == "cpu" and self._dtype == torch.float32 and torch.get_num_threads() == 1
        return [size for size in SMALL_BATCHES if size < self.batch_size] if one_thread or not self._exact else []
