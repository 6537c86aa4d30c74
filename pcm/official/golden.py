"""Recompute every output of a golden file: tensors that the published implementation gave for known weights and inputs.

Tensor names say what they are: `state.*` weights, `in.*` inputs, `mid.*` intermediate features, `out.{train,eval}.*`
model outputs in the replace and append layouts, `loss.NAME.*`, `grad.*`, `beamW.outO.*` and `greedy.*` decodes,
`extra.*`. A name that is none of these is reported and fails the verification; nothing is skipped.
"""

import dataclasses
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcm.captioners.pcmnet.config import PCMNetConfig
from pcm.captioners.pcmnet.decoding import Decoded, beam_search, greedy_search
from pcm.captioners.pcmnet.loss import CLIPWeightedCrossEntropy
from pcm.captioners.pcmnet.loss_settings import FocalMode
from pcm.captioners.pcmnet.mixup import Layout, MixUpFindings, inject_noise, textual_patches
from pcm.captioners.pcmnet.model import Encoded, PCMNet
from pcm.captioners.pcmnet.schedule import noam_lr
from pcm.errors import InputError, one_line
from pcm.official.golden_file import INPUTS, Golden, read_golden
from pcm.official.settings import CLIP_SCORE_SCALE
from pcm.official.state_dict import POSITION_KEY, config_from_state, from_official, position_rounding, to_official

#: Largest absolute difference allowed for float32 values. Ids and masks must be exact.
TOLERANCE = 2e-5
#: Learning rates are float64 and as small as 1e-8.
LEARNING_RATE_TOLERANCE = 1e-12
#: What the published code adds to the scores of masked positions.
MASKED = -10_000.0
#: CapDec's variance, which golden files use where their training noise is off.
DEFAULT_NOISE_VARIANCE = 0.016

_FOCAL_MODES: dict[str, FocalMode] = {"batch": "batch", "sent": "sentence", "word": "word"}


class Recomputation:
    """Our value of every output of a golden file, by its name there."""

    def __init__(self, golden: Golden):
        self.golden = golden
        self.inputs = {name: golden.tensors[f"in.{name}"].clone() for name in INPUTS}
        self.official_state = {
            name.removeprefix("state."): tensor for name, tensor in golden.tensors.items() if name.startswith("state.")
        }
        self.max_length = golden.setting("MODEL.MAX_SEQ_LEN", "max_seq_len")
        self.config = self._config()

    def _config(self) -> PCMNetConfig:
        setting = self.golden.setting
        return config_from_state(
            self.official_state,
            num_heads=setting("MODEL.BERT.NUM_ATTENTION_HEADS", "heads"),
            num_concepts=len(self.inputs["concept_embed"]),
            max_length=max(self.max_length, self.inputs["tokens_ids"].shape[1]),
            top_concepts=setting("MODEL.VISUAL_EMBED.CLIPTAG.TOPK", "topk"),
            top_patches=setting("MODEL.VISUAL_EMBED.CLIPTAG.TOPK2", "topk2"),
            concept_threshold=setting("MODEL.VISUAL_EMBED.CLIPTAG.THRES", "thres"),
            noise_variance=max(0.0, setting("MODEL.VISUAL_EMBED.NOISE_INJ_VAR", "noise_inj_var", 0.0)),
            # Golden files are made without dropout: its draws could not be repeated.
            hidden_dropout=0.0,
            attention_dropout=0.0,
            visual_dropout=0.0,
            word_dropout=0.0,
            output_dropout=0.0,
        )

    def _model(self, config: PCMNetConfig, *, training: bool) -> PCMNet:
        model = PCMNet(config)
        try:
            model.load_state_dict(from_official(self.official_state))
        except RuntimeError as error:  # a tensor of another shape
            raise InputError(f"golden file: {one_line(error)}") from None
        model.set_concepts(self.inputs["concept_embed"])
        return model.train(training)

    def __call__(self, name: str) -> Tensor:
        """Our value of output `name`. Raises KeyError for a name whose meaning is not known here."""
        family, _, rest = name.partition(".")
        if beam := re.fullmatch(r"beam(\d+)\.out(\d+)\.(ids|logp)", name):
            decoded = self._beam_search(beam_size=int(beam[1]), out_size=int(beam[2]))
            return decoded.token_ids if beam[3] == "ids" else decoded.log_probs
        families: dict[str, Callable[[str], Tensor]] = {
            "state": lambda rest: self._state[rest],
            "in": lambda rest: self.inputs[rest],  # after everything else: still what it was
            "mid": lambda rest: self._intermediate[rest],
            "out": self._output,
            "loss": self._loss,
            "grad_loss": lambda rest: {"value": self._gradients[0]}[rest],
            "grad": lambda rest: self._gradients[1][rest],
            "greedy": lambda rest: {"ids": self._greedy.token_ids, "logp": self._greedy.log_probs}[rest],
            "extra": self._extra,
        }
        return families[family](rest)

    @property
    def _features(self) -> tuple[Tensor, Tensor]:
        return self.inputs["global_feats"], self.inputs["att_feats"]

    @cached_property
    def eval_model(self) -> PCMNet:
        return self._model(self.config, training=False)

    @cached_property
    def _state(self) -> dict[str, Tensor]:
        return to_official(self.eval_model.state_dict())

    @cached_property
    def _mixup(self) -> MixUpFindings:
        return self.eval_model.find_pairs(*self._features)

    @cached_property
    def _intermediate(self) -> dict[str, Tensor]:
        mixup, embedding = self._mixup, self.eval_model.visual_embedding
        mask = mixup.mix_mask.long()
        textual = textual_patches(mixup.patch_concept_similarity, mixup.concept_vectors, tau=self.config.tau)
        with torch.no_grad():
            patch_proj = embedding.patch_projection(self.inputs["att_feats"])
            concept_proj = embedding.textual_projection(textual)
        return {
            "concept_prob": mixup.concept_probabilities,
            "topk_prob": mixup.top_probabilities,
            "topk_idx": mixup.top_concepts,
            "concept_keep": mixup.kept.float(),
            "concept_basis": mixup.concept_vectors,
            "patch_clip_embed": mixup.patch_embeddings,
            "patch_sim": mixup.patch_concept_similarity,
            "pair_prob": mixup.pair_probabilities,
            "pair_topm_idx": mixup.selected_pairs,
            "v_aware_concept": textual,
            "replace_mask": mask.float(),
            "token_type_ids": torch.cat([torch.zeros_like(mask[:, :1]), mask], dim=1),
            "token_type_ids_eval": torch.cat([torch.zeros_like(mask[:, :1]), torch.zeros_like(mask), mask], dim=1),
            "patch_proj": patch_proj,
            "concept_proj": concept_proj,
            "global_in": mixup.global_feature,
            "concept_embed_after_forward": self.eval_model.concept_embeddings,
            # The published loss overwrites its targets; ours does not (see in.target_ids): the effect, spelled out.
            "target_ids_after_loss": self.inputs["target_ids"].clamp_min(0),
        }

    @cached_property
    def _outputs(self) -> dict[str, tuple[Tensor, Encoded, Tensor]]:
        """For each layout: the visual embedding, the encoder's output, the logits."""
        result = {}
        with torch.no_grad():
            layouts: dict[str, Layout] = {"train": "replace", "eval": "append"}
            for mode, layout in layouts.items():
                model = self._model(self.config, training=mode == "train")
                embedding, _, _ = model.visual_embedding(*self._features, model.concept_embeddings, layout=layout)
                encoded = model.encode(*self._features, layout=layout)
                result[mode] = (embedding, encoded, model.decode(encoded, self.inputs["tokens_ids"]))
        return result

    def _output(self, name: str) -> Tensor:
        mode, what = name.split(".")
        embedding, encoded, logits = self._outputs[mode]
        mask = torch.ones(encoded.memory.shape[:2], dtype=torch.bool) if encoded.mask is None else encoded.mask
        return {
            "visual_embed": embedding,
            "encoder": encoded.memory,
            "logits": logits,
            "ext_att_mask": torch.where(mask, 0.0, MASKED)[:, None, None, :],
        }[what]

    def _loss_function(self, settings: dict[str, Any]) -> CLIPWeightedCrossEntropy:
        on = settings["gamma"] > 0
        return CLIPWeightedCrossEntropy(
            clip_weight=settings["alpha"],
            label_smoothing=settings["label_smoothing"],
            focal_gamma=settings["gamma"] if on else 1.0,
            focal_mode=_FOCAL_MODES[settings["gamma_type"]] if on else "off",
        )

    def _loss_value(self, settings: dict[str, Any], logits: Tensor) -> Tensor:
        clip_score = self.inputs["clip_score"] / CLIP_SCORE_SCALE
        return self._loss_function(settings)(logits, self.inputs["target_ids"], clip_score)

    def _loss(self, name: str) -> Tensor:
        variant, _, what = name.rpartition(".")
        settings = {settings["name"]: settings for settings in self.golden.part("spec").get("losses", [])}[variant]
        logits = self.golden.tensors.get("out.train.logits", self._outputs["train"][2]).clone().requires_grad_()
        value = self._loss_value(settings, logits)
        (gradient,) = torch.autograd.grad(value, logits)
        return {"value": value.detach(), "grad_logits": gradient, "grad_norm": gradient.norm()}[what]

    @property
    def _first_loss(self) -> dict[str, Any]:
        """Settings of the loss behind the gradients and the trajectory: the first, or else the published settings'."""
        if losses := self.golden.part("spec").get("losses"):
            return losses[0]
        setting = self.golden.setting
        return {
            "alpha": setting("LOSSES.ALPHA", "alpha"),
            "gamma": setting("LOSSES.GAMMA", "gamma"),
            "gamma_type": setting("LOSSES.GAMMA_TYPE", "gamma_type"),
            "label_smoothing": setting("LOSSES.LABELSMOOTHING", "label_smoothing"),
        }

    @cached_property
    def _gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        model = self._model(self.config, training=True)
        value = self._loss_value(self._first_loss, model(*self._features, self.inputs["tokens_ids"]))
        value.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        return value.detach(), to_official(gradients, positions=False)

    def _beam_search(self, *, beam_size: int, out_size: int) -> Decoded:
        return beam_search(
            self.eval_model, *self._features, beam_size=beam_size, out_size=out_size, max_length=self.max_length
        )

    @cached_property
    def _greedy(self) -> Decoded:
        return greedy_search(self.eval_model, *self._features, max_length=self.max_length)

    @cached_property
    def _trajectory(self) -> dict[str, Tensor]:
        """Losses before each optimiser step on the one batch, and the learning rates of these steps."""
        setting = self.golden.setting
        model = self._model(self.config, training=True)
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(
            parameters,
            betas=tuple(setting("SOLVER.BETAS", "betas", (0.9, 0.999))),
            eps=setting("SOLVER.EPS", "eps", 1e-8),
            weight_decay=setting("SOLVER.WEIGHT_DECAY", "weight_decay", 0.0),
        )
        warmup = self.golden.part("spec").get("traj_warmup") or setting("LR_SCHEDULER.WARMUP", "warmup")
        losses, rates = [], []
        for step in range(len(self.golden.tensors["extra.train_traj.loss"])):
            rate = noam_lr(
                step,
                model_size=setting("LR_SCHEDULER.MODEL_SIZE", "hidden"),
                warmup=warmup,
                factor=setting("LR_SCHEDULER.FACTOR", "factor", 1.0),
            )
            optimizer.param_groups[0]["lr"] = rate
            loss = self._loss_value(self._first_loss, model(*self._features, self.inputs["tokens_ids"]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_value_(parameters, setting("SOLVER.GRAD_CLIP", "grad_clip", 0.1))
            optimizer.step()
            losses.append(loss.detach())
            rates.append(rate)
        return {"loss": torch.stack(losses), "lr": torch.tensor(rates, dtype=torch.float64)}

    def _extra(self, name: str) -> Tensor:
        group, what = name.split(".")
        if group == "train_traj":
            return self._trajectory[what]
        if group == "noise":
            gauss = self.golden.tensors["extra.noise.gauss"]
            variance = self._noise_variance()
            return {
                "gauss": gauss,  # an input
                "out": inject_noise(self.inputs["global_feats"], variance=variance, noise=gauss),
            }[what]
        if group.startswith("topk2"):
            config = dataclasses.replace(self.config, top_patches=self.golden.part("spec")[group])
            mixup = self._model(config, training=False).find_pairs(*self._features)
            return {"replace_mask": mixup.mix_mask.float()}[what]
        raise KeyError(name)

    def _noise_variance(self) -> float:
        """The file's training noise; where that is off, what the tensor's meaning says, or CapDec's."""
        meaning = self.golden.part("tensors").get("extra.noise.out", {}).get("meaning", "")
        if stated := re.search(r"sqrt\(\s*([0-9.eE+-]+)\s*\)", meaning):
            return float(stated[1])
        return self.config.noise_variance or DEFAULT_NOISE_VARIANCE


def allowed_difference(name: str, tensor: Tensor) -> float:
    """How far our value of `name` may be from the file's `tensor`."""
    if not tensor.is_floating_point() or name.endswith(("_mask", "concept_keep")):
        return 0.0
    if name.endswith(POSITION_KEY):  # (1, length, H)
        return float(position_rounding(tensor.shape[1]).max())
    return LEARNING_RATE_TOLERANCE if name.endswith(".lr") else TOLERANCE


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; infinite for other shapes or where a value is not finite."""
    if ours.shape != theirs.shape:
        return float("inf")
    if theirs.numel() == 0:
        return 0.0
    difference = float((ours.double() - theirs.double()).abs().max())
    return difference if difference == difference else float("inf")


def verify(path: str | Path) -> dict[str, Any]:
    """Recompute every tensor of a golden file.

    The report: "ok"; "max_abs_diff", the largest absolute difference of each tensor (null: other shape or not finite);
    "failed" those beyond the tolerance; "unknown" names whose meaning is not known here; "missing" those that the
    description lists but the file lacks. Raises InputError for an unreadable file.
    """
    golden = read_golden(path)
    recompute = Recomputation(golden)
    differences: dict[str, float] = {}
    unknown: list[str] = []
    # Inputs come last, to show that nothing changed them.
    for name in sorted(golden.tensors, key=lambda name: (name.startswith("in."), name)):
        try:
            ours = recompute(name)
        except (KeyError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            unknown.append(name)
            continue
        differences[name] = largest_difference(ours.detach(), golden.tensors[name])
    failed = [
        name for name, value in differences.items() if not value <= allowed_difference(name, golden.tensors[name])
    ]
    missing = sorted(golden.part("tensors").keys() - golden.tensors.keys())
    return {
        "file": str(path),
        "ok": not (failed or unknown or missing),
        "tolerance": TOLERANCE,
        "outputs": len(differences),
        "largest": max((value for value in differences.values() if value != float("inf")), default=0.0),
        "failed": failed,
        "unknown": unknown,
        "missing": missing,
        "max_abs_diff": {name: None if value == float("inf") else value for name, value in differences.items()},
    }
