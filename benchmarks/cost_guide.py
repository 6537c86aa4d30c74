"""What a dataset costs: hours, money, bytes and store requests, from the seconds that a picture takes.

    python -m benchmarks.cost_guide --images 542401 --seconds-an-image 1.06 --gpus 64 --price-per-hour 1.80

    python -m benchmarks.cost_guide --published --prices L4=1 A100=2 H100=4

The seconds are those of one generator, as your pilot prints them (`jobs.generate --pilot 1%`: "s a picture and
generator", `predicted_seconds_an_image`). --published prints a table
of the published ones, each with its source. The price is yours to look up. Idle time, loading and restarts are a share
of the GPU hours (`benchmarks.schedule`).
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass

#: Its plan part is read, it is asked for its quarantine part (or this is put), its statistics and itself are put.
REQUESTS_A_SHARD = 4
SHARDS_A_GROUP = 1000

CARDS = ("L4", "A100", "H100")
SHARD_SIZE, BYTES_A_PICTURE, BYTES_OF_FEATURES = 256, 265_000, 132_600

#: Pictures of the published dataset, and of a hundred million captions.
SIZES = (542_401, 100_000_000)


@dataclass(frozen=True)
class Published:
    """A speed that somebody measured, one picture at a time."""

    model: str
    card: str
    seconds: float
    how: str
    source: str
    side: int = 512  # pixels


_CARD_OF_TURBO = "model card of stabilityai/sdxl-turbo-tensorrt"
PUBLISHED = (
    Published(
        "Stable Diffusion 1.5", "A100", 1.06, "50 steps, torch 2.1, compiled, channels last",
        "README of fal-ai/stable-diffusion-benchmarks",
    ),
    Published("SDXL-Turbo", "A100", 0.207, "1 step, float16", "Stability AI's announcement of SDXL Turbo"),
    Published("SDXL-Turbo", "A100", 0.139, "4 steps, TensorRT", _CARD_OF_TURBO),
    Published("SDXL-Turbo", "H100", 0.084, "4 steps, TensorRT", _CARD_OF_TURBO),
    Published(
        "FLUX.1-schnell", "H100", 0.775, "1024x1024, 4 steps, torch 2.5, compiled",
        "pull request 22986 of microsoft/onnxruntime", side=1024,
    ),
)  # fmt: skip
MODELS = ("Stable Diffusion 1.5", "SDXL-Turbo", "FLUX.1-schnell")
UNKNOWN = "no published figure found; measure with `--pilot`"


def cost_guide(
    *,
    images: int,
    seconds_an_image: float,
    gpus: int,
    price_per_hour: float,
    idle_share: float,
    shard_size: int,
    bytes_a_picture: int,
    bytes_of_features: int,
) -> dict[str, float]:
    """GPU hours and money with idle time in them; hours from the first GPU to the last; objects' bytes and requests."""
    gpu_hours = images * seconds_an_image / 3600 / (1 - idle_share)
    shards = -(-images // shard_size)
    return {
        "images": images,
        "gpu_hours": round(gpu_hours, 1),
        "hours": round(gpu_hours / gpus, 2),
        "money": round(gpu_hours * price_per_hour, 2),
        "money_per_1000_images": round(1000 * gpu_hours * price_per_hour / images, 4),
        "gigabytes": round(images * (bytes_a_picture + bytes_of_features) / 1e9, 1),
        "shards": shards,
        "store_requests": REQUESTS_A_SHARD * shards + -(-shards // SHARDS_A_GROUP),
    }


def published_table(prices: Mapping[str, float], *, gpus: int, idle_share: float) -> list[str]:
    """Lines of Markdown: what both sizes take with each model on each card; `prices` of an hour of each card."""
    lines = [
        "| model | card | seconds a picture | GPU-hours | hours | money | bytes | store requests |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model in MODELS:
        for card in CARDS:
            known = [one for one in PUBLISHED if (one.model, one.card) == (model, card)]
            lines += [_row(one, prices[card], gpus=gpus, idle_share=idle_share) for one in known]
            if not known:
                lines.append(f"| {model} | {card} | {UNKNOWN} | - | - | - | - | - |")
    return lines


def _row(published: Published, price: float, *, gpus: int, idle_share: float) -> str:
    costs = [
        cost_guide(
            images=images,
            seconds_an_image=published.seconds,
            gpus=gpus,
            price_per_hour=price,
            idle_share=idle_share,
            shard_size=SHARD_SIZE,
            bytes_a_picture=BYTES_A_PICTURE * published.side**2 // 512**2,
            bytes_of_features=BYTES_OF_FEATURES,
        )
        for images in SIZES
    ]
    both = [
        " / ".join(f"{cost[what]:,.{digits}f}" for cost in costs)
        for what, digits in (("gpu_hours", 0), ("hours", 1), ("money", 0), ("gigabytes", 0), ("store_requests", 0))
    ]
    hours, on_all, money, size, requests = both
    speed = f"{published.seconds:g}: {published.how} ({published.source})"
    return f"| {published.model} | {published.card} | {speed} | {hours} | {on_all} | {money} | {size} GB | {requests} |"


def parse_price(text: str) -> tuple[str, float]:
    card, _, price = text.partition("=")
    if card not in CARDS:
        raise argparse.ArgumentTypeError(f"{text!r}: give CARD=PRICE with a card of {', '.join(CARDS)}")
    return card, float(price)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=SIZES[0])
    parser.add_argument("--seconds-an-image", type=float, help="CLIP's share included, where it has one")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--price-per-hour", type=float, help="of one GPU, in your currency")
    parser.add_argument("--published", action="store_true", help="print a table of published speeds instead")
    parser.add_argument("--prices", type=parse_price, nargs="+", metavar="CARD=PRICE", help="with --published")
    parser.add_argument("--idle-share", type=float, default=0.05, help="of the GPU hours: loading, restarts, the end")
    parser.add_argument("--shard-size", type=int, default=SHARD_SIZE)
    parser.add_argument(
        "--bytes-a-picture", type=int, default=BYTES_A_PICTURE, help="a PNG of 512x512, as real photos have it"
    )
    parser.add_argument("--bytes-of-features", type=int, default=BYTES_OF_FEATURES, help="of ViT-L/14")
    asked = vars(parser.parse_args())
    published, prices = asked.pop("published"), dict(asked.pop("prices") or ())
    if published and set(prices) != set(CARDS):
        parser.error(f"--published: give --prices of {', '.join(CARDS)}, such as A100=2")
    if not published and (asked["seconds_an_image"] is None or asked["price_per_hour"] is None or prices):
        parser.error("give --seconds-an-image and --price-per-hour, or --published and --prices")
    if published:
        print("\n".join(published_table(prices, gpus=asked["gpus"], idle_share=asked["idle_share"])))
    else:
        print(json.dumps(cost_guide(**asked)))


if __name__ == "__main__":
    main()
