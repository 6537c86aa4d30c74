"""The pack's texts: model card and licences. Lines are as long as Markdown tables and templates need."""
# ruff: noqa: E501

from pcm.embedded import GUIDANCE_SCALE, STEPS
from pcm.embedded.making.world import COLOURS, FIRST, NOUNS, PAINTER_STYLE, PLACES, SECOND, SEEN_STYLES

PREVIOUS = "403e839"  # whose pack the models of this one began with

LICENSES = """# Licences of the drawings

The pictures in the `photos_*.parquet` files, and the pictures the models were trained on, are composed from these
open-licensed sets (as packaged by Iconify on npm, `@iconify-json/...`), scaled, turned, recoloured and put on plain
backgrounds; for the training of CLIP also redrawn (other shades, outlines and proportions):

| Set | Package | Author | Licence | Used for |
|---|---|---|---|---|
| [Fluent UI Emoji (flat)](https://github.com/microsoft/fluentui-emoji) | fluent-emoji-flat | Microsoft Corporation | MIT | `photos_val.parquet`, `photos_test.parquet` |
| [Firefox OS Emoji](https://github.com/mozilla/fxemoji) | fxemoji | Mozilla | Apache-2.0 | `photos_val_second.parquet`, `photos_test_second.parquet` |
| [Twemoji](https://github.com/jdecked/twemoji) | twemoji | Twitter and contributors | CC BY 4.0 | training of all models |
| [Noto Emoji](https://github.com/googlefonts/noto-emoji) | noto, noto-v1 | Google Inc | Apache-2.0 | training of CLIP |
| [Emoji One / EmojiTwo](https://github.com/EmojiTwo/emojitwo) | emojione, emojione-monotone | Emoji One, EmojiTwo contributors | CC BY 4.0 | training of CLIP |
| [Emoji One (v1)](https://github.com/joypixels/emojione-legacy) | emojione-v1 | Emoji One | CC BY-SA 4.0 | training of CLIP |
| [OpenMoji](https://openmoji.org) | openmoji | OpenMoji contributors, HfG Schwaebisch Gmuend | CC BY-SA 4.0 | training of CLIP |
| [Streamline Emojis](https://github.com/webalys-hq/streamline-vectors) | streamline-emojis | Streamline | CC BY 4.0 | training of CLIP |

No drawing under CC BY-SA is part of this pack. CC BY 4.0: https://creativecommons.org/licenses/by/4.0/ - CC BY-SA 4.0:
https://creativecommons.org/licenses/by-sa/4.0/ - Apache-2.0: https://www.apache.org/licenses/LICENSE-2.0 - changes were
made as described above.

The MIT licence of Fluent UI Emoji, whose drawings appear in the test sets:

    Copyright (c) Microsoft Corporation.

    Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
    documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
    rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
    persons to whom the Software is furnished to do so, subject to the following conditions:

    The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
    Software.

    THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
    WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
    COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
    OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

Captions, code and model weights are this project's own (Apache-2.0).
"""


def model_card(figures: dict) -> str:
    """MODEL_CARD.md, every number from `figures`."""
    clip, judge, t2i, training = (figures[name] for name in ("clip", "judge", "t2i", "training"))

    def percent(share: float) -> str:
        return f"{100 * share:.0f} %"

    def row(label: str, key: str, chance: str) -> str:
        shares = " | ".join(percent(clip[check][key]) for check in ("seen", "unseen", "second"))
        return f"| {label} | {shares} | {chance} |"

    def trained(name: str) -> str:
        return f"{training[name]['steps']:,} steps, {training[name]['seconds'] / 60:.0f} minutes"

    def own(nouns: set[str]) -> str:
        return ", ".join(noun.name for noun in NOUNS if noun.name in nouns)

    first, second = set(FIRST.places), set(SECOND.places)
    sampled = f"DPM-Solver++ with {STEPS} steps at guidance {GUIDANCE_SCALE}: {t2i['cpu_seconds_a_picture']:.2f} CPU-seconds a picture, batch 8"
    return f"""# Embedded models

Small models of one small drawn world, trained on CPU by `python -m jobs.pretrain_embedded`. They make the
demo, the tests and the experiments run without a network, a GPU or a model hub. They know nothing of real photographs.

## The world

Pictures of one to three things of {len(NOUNS)} kinds in {len(PLACES)} places, some painted {", ".join(COLOURS)}; 64 x 64
pixels. Two domains stand to each other as MSCOCO and Flickr30k do: nouns, places, sentences and drawing style differ.

| | first domain | second domain |
|---|---|---|
| kinds of things | {len(first)} | {len(second)} |
| only there | {own(first - second)} | {own(second - first)} |
| in both | {own(first & second)} | the same |
| places | {", ".join(place for place in PLACES if any(place in found for found in FIRST.places.values()))} | {", ".join(place for place in PLACES if any(place in found for found in SECOND.places.values()))} |
| sentences | "two dogs sitting on the beach" | "two dogs rest together by the ocean" |
| drawing style of the "real photos", seen by no training | `{FIRST.unseen_style}` | `{SECOND.unseen_style}` |

Drawing styles that trainings see: {", ".join(f"`{style}`" for style in SEEN_STYLES)}.

| File | What |
|---|---|
| `captions.txt`, `captions_second.txt` | {figures["captions"]:,} captions of scenes nobody drew, each: the text-only training corpora |
| `photos_val.parquet`, `photos_test.parquet`, `photos_val_second.parquet`, `photos_test_second.parquet` | 100 (val) and 200 (test) "real photos" with 5 references each |
| `clip/` | open_clip folder: `open_clip.create_model("local-dir:...")`, `open_clip.get_tokenizer("local-dir:...")` |
| `t2i/` | diffusers folder: `DiffusionPipeline.from_pretrained(...)`, a `StableDiffusionPipeline` |
| `samples.png` | the first of the generated pictures behind the figures below, one seed each, none picked |
| `samples_by_score.png` | of all of these, the best, middle and worst by the score that the packed CLIP gives them |
| `figures.json` | the figures below, as `--stage pack` measured them |

{figures["megabytes"]} MB in all; weights are float16 and load as float32. Minutes are wall-clock time on a shared machine.

## CLIP

open_clip's CLIP, ViT with 8-pixel patches (64 patches, width 192, 6 layers), text tower of width 192, 3 layers, context 24.
Contrastive loss + a loss that ties single nouns to the picture and to the patches that show them, because PCM-Net reads
nouns off patches. Trained on scenes in which every thing is in a style of its own and, in three of five, redrawn in other
shades, proportions and outlines. {trained("clip")}.

| Held-out scenes | seen styles, first domain | unseen style, first domain | unseen style, second domain | chance |
|---|---|---|---|---|
{row("image-to-text R@1 among 256 (mean of three sets of 256), a caption of the same things in the same numbers counts", "r1", "1 %")}
{row("the same, only the picture's own caption counts", "r1_exact", "0.4 %")}
{row(f"noun of a single thing among {len(NOUNS)}", "noun", "2 %")}
{row("best patch for a noun lies in its half, pairs", "patch", "50 %")}

## Text to image

TAESD-style autoencoder (the previous version's, {trained("vae")}), a text encoder of its own (CLIP's architecture, told what stands where:
{trained("text")}) and a UNet denoiser (v-prediction, {trained("denoiser")}), trained on scenes of both domains in one
style (`{PAINTER_STYLE}`) and fixed poses. {sampled}.

Judge: a convolutional network trained on drawn scenes alone ({trained("judge")}); it never saw a generated picture and
shares nothing with CLIP. It names {percent(judge["single"])} of single things in held-out drawn scenes in varied poses, both
of two in {percent(judge["both"])}.
Recognised in generated pictures: single things {percent(t2i["single"])} (chance 2 %), both of two things {percent(t2i["both"])},
at least one of two {percent(t2i["any"])}, the place {percent(t2i["place"])}.

## Limits

- Only the words of the two grammars mean anything; other words are spelt in letters the models have not learned.
- Generated pictures have real defects (a missing or doubled thing, melted shapes, colours on the wrong thing): they are what
  the method under study has to cope with.
- Not trained from scratch in one go: CLIP and the denoiser began with the weights of the previous version of this pack
  (commit {PREVIOUS}; CLIP 1,450 steps on three of the seen styles, denoiser 4,500 steps), with `--clip-start` and
  `--t2i-start`; the steps above come on top. The autoencoder is the previous one. The command resumes from checkpoints, so the weights are not
  reproducible byte for byte.
- When to stop training was decided on the held-out scenes of the CLIP table, so those figures are a little kind; the
  pictures of the test sets were used for nothing.
- Seconds a picture were measured while other work ran on the same machine.
"""
