"""A CLIP's configuration, read before open_clip sees it: what it may say is a short list.

open_clip passes parts of it on to Transformers and timm, which can be told to run Python of a model's folder or to
fetch another repo. A folder or a hub repo comes from outside, so anything that is not on the list is refused by name.
"""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pcm.torchvision_shim  # noqa: F401  isort: skip
import open_clip
import transformers.dynamic_module_utils
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg

from pcm.clip.names import HUB_PREFIX, LOCAL_PREFIX
from pcm.documents import read_document
from pcm.errors import InputError, first_line

# open_clip builds a text tower of Transformers without saying trust_remote_code, and then a terminal is asked whether
# to run the Python of a repo. Zero seconds to answer: it is refused.
transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

CONFIG_FILE = "open_clip_config.json"
#: A configuration has some 2 kB.
LARGEST_CONFIG = 2**20

#: What a tokenizer may be told; everything else reaches `AutoTokenizer.from_pretrained`, trust_remote_code too.
TOKENIZER_SETTINGS = ("clean", "strip_sep_token", "language", "use_fast")

_MODEL_FIELDS = (
    *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "multimodal_cfg", "output_dict"),
    *("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"),
)
_MULTIMODAL_FIELDS = ("attn_pooler_heads", "dim_head", "n_queries")
#: Names of other models: of a hub repo, or one of timm's own. No path, no "hf-hub:" of timm's.
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TIMM_NAME = re.compile(r"[\w.]+")


def model_config(architecture: str, *, commit: str | None = None) -> dict[str, Any]:
    """open_clip's configuration of one of its names, `local-dir:FOLDER` or `hf-hub:REPO` (at a commit).

    Raises InputError for one that says what is not allowed, and what the hub's client raises.
    """
    if architecture.startswith(HUB_PREFIX):
        repo = architecture.removeprefix(HUB_PREFIX)
        return read_config(Path(open_clip.pretrained.download_pretrained_from_hf(repo, CONFIG_FILE, revision=commit)))
    if architecture.startswith(LOCAL_PREFIX):
        return read_config(Path(architecture.removeprefix(LOCAL_PREFIX)) / CONFIG_FILE)
    return open_clip.get_model_config(architecture)


def read_config(path: Path) -> dict[str, Any]:
    """`model_cfg` of an open_clip_config.json, checked. Raises InputError."""
    document = _json_object(path)
    _only(path, "", document, ("model_cfg", "preprocess_cfg"))
    model = _object(path, "model_cfg", document.get("model_cfg"))
    _only(path, "preprocess_cfg.", _object(path, "preprocess_cfg", document.get("preprocess_cfg", {})), _PREPROCESS)
    _only(path, "model_cfg.", model, _MODEL_FIELDS)
    vision = _object(path, "vision_cfg", model.get("vision_cfg"))
    text = _object(path, "text_cfg", model.get("text_cfg"))
    _only(path, "vision_cfg.", vision, _fields(CLIPVisionCfg))
    _only(path, "text_cfg.", text, _fields(CLIPTextCfg))
    decoder = _object(path, "multimodal_cfg", model.get("multimodal_cfg", {}))
    _only(path, "multimodal_cfg.", decoder, (*_fields(CLIPTextCfg), *_MULTIMODAL_FIELDS))
    for part in (text, decoder):
        settings = _object(path, "tokenizer_kwargs", part.get("tokenizer_kwargs") or {})
        _only(path, "text_cfg.tokenizer_kwargs.", settings, TOKENIZER_SETTINGS)
        for name in ("hf_model_name", "hf_tokenizer_name"):
            _named(path, f"text_cfg.{name}", part.get(name), _REPO, "a repo of the hub")
    _named(path, "vision_cfg.timm_model_name", vision.get("timm_model_name"), _TIMM_NAME, "a model of timm's own")
    if vision.get("pool_type") == "none":
        raise InputError(
            f"{path}: vision_cfg.pool_type 'none' leaves a picture without one feature; give a CLIP with 'tok' or 'avg'"
        )
    _refuse_code(path.parent)
    return model


def open_tokenizer(architecture: str, *, repo: str | None = None, commit: str | None = None) -> Any:
    """The tokenizer of a name, folder or repo, none of whose Python runs.

    repo, commit: where a `local-dir:FOLDER` or a name's weights came from; a tokenizer of that repo is of that commit.
    Raises InputError for a configuration that is not allowed.
    """
    text = model_config(architecture, commit=commit).get("text_cfg", {})
    name, settings = text.get("hf_tokenizer_name"), dict(text.get("tokenizer_kwargs") or {})
    if not name:
        return open_clip.get_tokenizer(architecture)
    if architecture.startswith(HUB_PREFIX):
        repo = architecture.removeprefix(HUB_PREFIX)
    if architecture.startswith(LOCAL_PREFIX) and repo is None:
        name = architecture.removeprefix(LOCAL_PREFIX)
    elif name == repo:
        settings["revision"] = commit
    return open_clip.tokenizer.HFTokenizer(
        name,
        context_length=text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
        tokenizer_mode=text.get("tokenizer_mode"),
        trust_remote_code=False,
        **settings,
    )


def _fields(kind: Any) -> tuple[str, ...]:
    return tuple(entry.name for entry in dataclasses.fields(kind))


_PREPROCESS = _fields(PreprocessCfg)


def _refuse_code(folder: Path) -> None:
    """Raises InputError where a configuration of Transformers in the folder names Python of its own."""
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        path = folder / name
        if path.is_file() and "auto_map" in _json_object(path):
            raise InputError(
                f"{path}: 'auto_map' asks for Python code of the model's own, which is never run; "
                "give a model that needs none"
            )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_CONFIG + 1)
        if len(data) > LARGEST_CONFIG:
            raise InputError(f"{path}: over {LARGEST_CONFIG} bytes, which no configuration has")
        return _object(path, "it", read_document(data))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({first_line(error)})") from None


def _object(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path}: {name} must be an object of JSON, and is {type(value).__name__}")
    return value


def _only(path: Path, where: str, given: dict[str, Any], allowed: Iterable[str]) -> None:
    for name in given:
        if name not in allowed:
            raise InputError(
                f"{path}: {where}{name} is not allowed in the configuration of a CLIP; "
                f"allowed there are {', '.join(allowed)}"
            )


def _named(path: Path, where: str, value: Any, pattern: re.Pattern[str], wanted: str) -> None:
    if value and not (isinstance(value, str) and pattern.fullmatch(value)):
        raise InputError(f"{path}: {where} {str(value)[:80]!r} must be the name of {wanted}")
