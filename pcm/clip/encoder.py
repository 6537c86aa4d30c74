"""The frozen CLIP: scores a picture against its caption and gives the features that PCM-Net reads.

Any open_clip model with a ViT image tower and [CLS] pooling. Feature conventions are the paper's section 3.1 and the
published features: `patch_features` are the last block's tokens before ln_post and projection; a grid larger than
8x8 with even sides is 2x2 average-pooled (ViT-L/14: 16x16 -> 64 patches; ViT-B/16: 14x14 -> 49).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pcm.clip.names import activation_of, count_tokens, resolve_clip_name
from pcm.errors import InputError, first_line
from pcm.images import to_uint8
from pcm.records import FeatureShape
from pcm.spec import ClipSpec

#: Grids up to this side are kept as they are; larger even ones are 2x2 average-pooled.
MAX_GRID_SIDE = 8

#: Threads that open and preprocess pictures beside the model.
PREPROCESSING_THREADS = 4

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ImageFeatures:
    """global_feature (B, D) float32, L2-normalised; patch_features (B, N, D_v) float32."""

    global_feature: np.ndarray
    patch_features: np.ndarray


class ClipEncoder:
    """An open_clip model as a feature extractor.

    `name` is "architecture/pretrained" (`ViT-L-14/openai`; `pretrained` may be a checkpoint file), `hf-hub:org/repo`,
    a folder with open_clip_config.json and weights, or `embedded`. Batches are padded to `batch_size` so that a
    picture's features do not depend on how many neighbours it had.

    `activation` is what the features at hand were recorded with, where that is known.

    Raises InputError when the model cannot be found, is no ViT with [CLS] pooling or runs another activation.
    """

    def __init__(
        self,
        name: str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_size: int = ClipSpec.batch_size,
        activation: str | None = None,
    ) -> None:
        # Three seconds to import, and whoever only names this class needs neither.
        import pcm.torchvision_shim  # noqa: F401  isort: skip
        import open_clip
        from open_clip.transformer import VisionTransformer

        self.name = name
        self.device = torch.device(device)
        self.batch_size = batch_size
        self._dtype = _DTYPES[dtype]
        architecture, pretrained = resolve_clip_name(name)
        self.activation = activation_of(architecture, pretrained)
        self.check_activation(activation)
        try:
            model = open_clip.create_model(
                architecture,
                pretrained=pretrained,
                device=self.device,
                force_quick_gelu=self.activation == "quick_gelu",
                require_pretrained=True,
            )
            self._tokenizer = open_clip.get_tokenizer(architecture)
        except (RuntimeError, OSError, ValueError, FileNotFoundError) as error:
            raise InputError(
                f"CLIP model {name!r} cannot be loaded: {first_line(error)}; "
                "give ARCHITECTURE/PRETRAINED (see open_clip.list_pretrained()), a folder, or 'embedded'"
            ) from error
        visual = model.visual
        if not isinstance(visual, VisionTransformer) or visual.pool_type != "tok" or visual.attn_pool is not None:
            raise InputError(
                f"CLIP model {name!r}: needs a ViT image tower with [CLS] pooling, such as ViT-L-14/openai"
            )
        self._model = model.eval().requires_grad_(False).to(dtype=self._dtype)
        self._visual = visual
        self._preprocess = open_clip.transform.image_transform_v2(
            open_clip.transform.PreprocessCfg(**visual.preprocess_cfg), is_train=False
        )
        self.resolution: int = visual.image_size[0]
        self.context_length: int = getattr(model, "context_length", 77)
        self.embed_dim: int = visual.output_dim
        self.patch_dim: int = visual.conv1.out_channels
        self._grid: tuple[int, int] = visual.grid_size
        self._pool = _pools(self._grid)
        cells = self._grid[0] * self._grid[1]
        self.num_patches: int = cells // 4 if self._pool else cells
        #: Patches that a row of the picture has, of the N that are row-major.
        self.patch_columns: int = self._grid[1] // 2 if self._pool else self._grid[1]

    @classmethod
    def from_spec(cls, spec: ClipSpec, *, model: str | None = None, device: str | None = None) -> "ClipEncoder":
        """The CLIP that a spec pins; `model` is where it is now, if it has moved."""
        return cls(
            model or spec.model,
            device=device or spec.device,
            dtype=spec.dtype,
            batch_size=spec.batch_size,
            activation=spec.activation,
        )

    def check_activation(self, recorded: str | None) -> None:
        """Raises InputError when features recorded with an activation were made with another than this CLIP runs."""
        if None not in (recorded, self.activation) and recorded != self.activation:
            raise InputError(
                f"CLIP model {self.name!r}: runs {self.activation}, but the features at hand were made with "
                f"{recorded}; featurise again, or give the CLIP that made them"
            )

    @property
    def features(self) -> FeatureShape:
        return FeatureShape(embed_dim=self.embed_dim, patch_dim=self.patch_dim, num_patches=self.num_patches)

    @torch.inference_mode()
    def encode_images(self, images: Sequence[Image.Image | Callable[[], Image.Image]]) -> ImageFeatures:
        """Features of PIL images of any size, or of what functions return that open them.

        The next batch is opened and preprocessed in threads while the model works on this one.
        """
        global_features, patch_features = [], []
        for pixel_values in self._preprocessed(images):  # (B, 3, H, W)
            output = self._visual.forward_intermediates(
                self._padded(pixel_values).to(self.device, self._dtype), indices=1, output_fmt="NCHW"
            )
            tokens = output["image_intermediates"][-1].float()  # (B, D_v, h, w)
            if self._pool:
                tokens = torch.nn.functional.avg_pool2d(tokens, 2)
            pooled = torch.nn.functional.normalize(output["image_features"].float(), dim=-1)  # (B, D)
            count = len(pixel_values)
            global_features.append(pooled[:count].cpu().numpy())
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
            token_ids = self._padded(self._tokenizer(batch)).to(self.device)  # (B, context)
            features = torch.nn.functional.normalize(self._model.encode_text(token_ids).float(), dim=-1)
            rows.append(features[: len(batch)].cpu().numpy())
        return np.concatenate(rows) if rows else np.zeros((0, self.embed_dim), np.float32)

    def count_tokens(self, text: str) -> int:
        """CLIP tokens of `text` including start and end, before truncation."""
        return count_tokens(self._tokenizer, text)

    def head(self) -> dict[str, torch.Tensor]:
        """The [CLS] head that PCM-Net applies to patches: ln_post.weight (D_v,), ln_post.bias (D_v,), proj (D_v, D)."""
        return {
            "ln_post.weight": self._visual.ln_post.weight.detach().float().cpu().clone(),
            "ln_post.bias": self._visual.ln_post.bias.detach().float().cpu().clone(),
            "proj": self._visual.proj.detach().float().cpu().clone(),
        }

    def _padded(self, batch: torch.Tensor) -> torch.Tensor:
        missing = self.batch_size - len(batch)
        return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing else batch


def _pools(grid: tuple[int, int]) -> bool:
    return min(grid) > MAX_GRID_SIDE and grid[0] % 2 == 0 and grid[1] % 2 == 0
