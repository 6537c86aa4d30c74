"""The pack's texts: model card and licences. Lines are as long as Markdown tables and templates need."""
# ruff: noqa: E501

from pcm.embedded.judging import GUIDANCE
from pcm.embedded.t2i_training import STEPS
from pcm.embedded.world import COLOURS, NOUNS, PAINTER_STYLE, PLACES, SEEN_STYLES, UNSEEN_STYLE

LICENSES = """# Licences of the drawings

The pictures in `photos_val.parquet` and `photos_test.parquet`, and the pictures the models were trained on, are composed
from these open-licensed sets (as packaged by Iconify on npm), scaled, turned, recoloured and put on plain backgrounds:

| Set | Author | Licence | Used for |
|---|---|---|---|
| [Fluent UI Emoji (flat)](https://github.com/microsoft/fluentui-emoji) | Microsoft Corporation | MIT | the test sets |
| [Twemoji](https://github.com/jdecked/twemoji) | Twitter and contributors | CC BY 4.0 | training |
| [Noto Emoji](https://github.com/googlefonts/noto-emoji) | Google Inc | Apache-2.0 | training |
| [Emoji One / EmojiTwo](https://github.com/EmojiTwo/emojitwo) | Emoji One, EmojiTwo contributors | CC BY 4.0 | training |

CC BY 4.0: https://creativecommons.org/licenses/by/4.0/ - changes were made as described above.

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
    seen, unseen, t2i, training = (
        figures["clip"]["seen"],
        figures["clip"]["unseen"],
        figures["t2i"],
        figures["training"],
    )

    def percent(share: float) -> str:
        return f"{100 * share:.0f} %"

    def row(label: str, key: str, chance: str) -> str:
        return f"| {label} | {percent(seen[key])} | {percent(unseen[key])} | {chance} |"

    return f"""# Embedded models

Two small models of one small drawn world, trained together from scratch on CPU by `python -m jobs.pretrain_embedded`.
They make the demo and the tests run without a network, a GPU or a model hub. They know nothing of real photographs.

## The world

Pictures of {len(NOUNS)} kinds of things ({", ".join(noun.name for noun in NOUNS)}) in {len(PLACES)} places
({", ".join(PLACES)}), one or two things a picture, some painted {", ".join(COLOURS)}; 64 x 64 pixels. Captions come from
a small grammar (counts, colours, places, left and right). Drawing styles seen in training: {", ".join(SEEN_STYLES)}.
`{UNSEEN_STYLE}` is seen by no training: its pictures, with more varied poses and backgrounds, are the "real photos".

| File | What |
|---|---|
| `captions.txt` | {figures["captions"]:,} captions of scenes nobody drew: the text-only training corpus |
| `photos_val.parquet`, `photos_test.parquet` | 100 and 200 "real photos" with 5 references each |
| `clip/` | open_clip folder: `open_clip.create_model("local-dir:...")`, `open_clip.get_tokenizer("local-dir:...")` |
| `t2i/` | diffusers folder: `DiffusionPipeline.from_pretrained(...)`, a `StableDiffusionPipeline` |
| `samples.png` | the generated pictures behind the figures below, one seed each, none picked |
| `figures.json` | the figures below, as `--stage pack` measured them |

{figures["megabytes"]} MB in all; weights are float16 and load as float32.

## CLIP

open_clip's CLIP, ViT with 8-pixel patches (64 patches, width 192, 6 layers), text tower of width 192, 3 layers, context 24.
Contrastive loss + a loss that ties single nouns to the picture and to the patches inside the thing's drawn box (maximum over
patches), because PCM-Net reads nouns off patches. {training["clip"]["steps"]} steps of batch 64 on 24,000 scenes,
{training["clip"]["seconds"] / 60:.0f} minutes on a busy CPU core.

| Held-out scenes | seen styles | unseen style | chance |
|---|---|---|---|
{row("image-to-text R@1 among 256, a caption of the same nouns counts", "r1", "1 %")}
{row("the same, only the picture's own caption counts", "r1_exact", "0.4 %")}
{row("noun of a single thing, 32-way", "noun", "3 %")}
{row("best patch for a noun lies in its half, pairs", "patch", "50 %")}

## Text to image

TAESD-style autoencoder (64 x 64 to 16 x 16 x 8, {training["vae"]["steps"]} steps), a frozen copy of the CLIP's text tower as it was
after {training["text_tower"]["clip_step"]} steps, and a UNet denoiser (v-prediction, {training["denoiser"]["steps"]} steps of batch 16,
{training["denoiser"]["seconds"] / 60:.0f} minutes on a busy CPU core), trained on 24,000 scenes of one style (`{PAINTER_STYLE}`) in
fixed poses. DPM-Solver++ with {STEPS} steps at guidance {GUIDANCE}: {t2i["cpu_seconds_a_picture"]:.2f} CPU-seconds a picture, batch 8.

Judge: the CLIP above, which was trained on drawn scenes only and never saw a generated picture.
Recognised: single things {percent(t2i["single"])} (chance 3 %), both of two things {percent(t2i["both"])},
at least one of two {percent(t2i["any"])}.

## Limits

- Only the words of the grammar mean anything; other words are spelt in letters the models have not learned.
- Generated pictures have real defects (a missing or doubled second thing, melted airplanes, umbrellas and vehicles, colours
  on the wrong thing): they are what the method under study has to cope with.
- 8 sampler steps look the same and cost half. Seconds were measured while other work ran on the same cores.
- When to stop training was decided on the held-out scenes of the CLIP table, so those figures are a little kind; the
  pictures of the two test sets were used for nothing.
- A first version: trained briefly, on a shared machine. The commands are those of `jobs.pretrain_embedded`, but these
  weights are not reproducible byte for byte: the CLIP was trained in two sittings (900 steps, then its learning rate
  rose again and saturation changes joined the augmentation), its plain pictures (a third) had a pixel of jitter, and the
  decoder of the autoencoder learned on after the denoiser had begun.
"""
