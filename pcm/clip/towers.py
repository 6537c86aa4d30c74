"""What an open_clip image tower gives beside its global feature: a grid of tokens, and the head that maps one of them
into the joint space where there is one.

Tokens: ViTs of open_clip and of timm (SigLIP, EVA, PE, MobileCLIP2-B and -L, ViTamin), after the last block and before
the last norm. Not ResNets, ConvNeXt, FastViT and Swin, which make their feature maps smaller from stage to stage.

A head: where the tower pools its [CLS] token or the mean of its tokens and then applies a layer norm and a linear map
(in either order of norm and mean), the same norm and map take one token into the joint space; PCM-Net does that with
CLIP's patches (section 3.1 of arXiv 2501.00437). Attention pooling (SigLIP, PE-Core, CoCa) has no such map: its query,
its MLP and its norms act on a mixture of all tokens.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pcm.records import NULL_FEATURES, FeatureShape

#: Grids up to this side are kept as they are; larger even ones are 2x2 average-pooled.
MAX_GRID_SIDE = 8


@dataclass(frozen=True)
class TokenGrid:
    """rows x columns tokens of `width`, before 2x2 pooling. has_head: they can be mapped to the joint space."""

    rows: int
    columns: int
    width: int
    has_head: bool

    @property
    def pools(self) -> bool:
        sides = (self.rows, self.columns)
        return min(sides) > MAX_GRID_SIDE and not any(side % 2 for side in sides)

    @property
    def patch_rows(self) -> int:
        return self.rows // 2 if self.pools else self.rows

    @property
    def patch_columns(self) -> int:
        return self.columns // 2 if self.pools else self.columns


def feature_shape(embed_dim: int, grid: TokenGrid | None) -> FeatureShape:
    """What a dataset stores of a row."""
    patches = (
        NULL_FEATURES if grid is None else FeatureShape(embed_dim, grid.width, grid.patch_rows * grid.patch_columns)
    )
    return dataclasses.replace(patches, embed_dim=embed_dim)


def token_grid(visual: nn.Module) -> TokenGrid | None:
    """The tokens of an open_clip image tower (`model.visual`), or None where it has no grid of them."""
    from open_clip.transformer import VisionTransformer

    has_head = _norm_and_projection(visual) is not None
    if isinstance(visual, VisionTransformer):
        rows, columns = visual.grid_size
        return TokenGrid(rows, columns, visual.conv1.out_channels, has_head)
    trunk: Any = _timm_vit(visual)
    if trunk is None:
        return None
    # Not `grid_size`: ViTamin-XL-384 is given pictures of 256 pixels, and takes any size.
    rows, columns = trunk.patch_embed.dynamic_feat_size(visual.image_size)
    return TokenGrid(rows, columns, trunk.embed_dim, has_head)


def image_features(visual: nn.Module, grid: TokenGrid | None, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
    """(B, D), not normalised, and the tokens (B, D_v, rows, columns), 2x2 average-pooled where the grid is large."""
    if grid is None:
        return visual(pixel_values), None
    tower: Any = visual
    output = tower.forward_intermediates(pixel_values, indices=1, output_fmt="NCHW")
    tokens = output["image_intermediates"][-1].float()
    return output["image_features"], nn.functional.avg_pool2d(tokens, 2) if grid.pools else tokens


def token_head(visual: nn.Module) -> dict[str, Tensor]:
    """ln_post.weight (D_v,), ln_post.bias (D_v,) and proj (D_v, D) in float32: norm(token) @ proj is in the joint
    space. Empty where the tower has no such head.

    A projection's own bias c moves into the norm's: the b of least norm with b @ proj = c, which exists as D <= D_v.
    """
    found = _norm_and_projection(visual)
    if found is None:
        return {}
    norm, proj, proj_bias = found
    bias = norm.bias.detach().double().cpu()
    if proj_bias is not None:
        bias = bias + proj_bias.detach().double().cpu() @ torch.linalg.pinv(proj.detach().double().cpu())
    return {
        "ln_post.weight": norm.weight.detach().float().cpu().clone(),
        "ln_post.bias": bias.float(),
        "proj": proj.detach().float().cpu().contiguous().clone(),
    }


def _norm_and_projection(visual: nn.Module) -> tuple[nn.LayerNorm, Tensor, Tensor | None] | None:
    """The layer norm, the projection (D_v, D) and its bias (D,) between the last token and the joint space."""
    from open_clip.transformer import VisionTransformer

    tower: Any = visual
    if isinstance(visual, VisionTransformer):
        if tower.attn_pool is not None or tower.proj is None:
            return None
        return tower.ln_post, tower.proj, None
    trunk: Any = _timm_vit(visual)
    if trunk is None or trunk.global_pool not in ("token", "avg") or getattr(trunk, "attn_pool", None) is not None:
        return None
    candidates: list[Any] = [getattr(trunk, "norm", None), getattr(trunk, "fc_norm", None)]
    norms = [part for part in candidates if _is_norm(part)]
    linears = [part for part in (getattr(trunk, "head", None), *tower.head) if isinstance(part, nn.Linear)]
    others = [part for part in tower.head if not isinstance(part, nn.Linear | nn.Dropout)]
    if len(norms) != 1 or len(linears) != 1 or others:
        return None
    linear = linears[0]
    if linear.bias is not None and linear.out_features > linear.in_features:
        return None
    return norms[0], linear.weight.T, linear.bias


def _timm_vit(visual: nn.Module) -> Any:
    """timm's model, where it is one whose tokens stay on one grid."""
    trunk = getattr(visual, "trunk", None)
    return trunk if hasattr(trunk, "num_prefix_tokens") and hasattr(trunk, "forward_intermediates") else None


def _is_norm(part: object) -> bool:
    return isinstance(part, nn.LayerNorm) and part.bias is not None
