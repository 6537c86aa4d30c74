"""What a dataset costs: hours, money, bytes and store requests, from the seconds that a picture takes.

    python -m benchmarks.cost_guide --images 542401 --seconds-an-image 1.06 --gpus 64 --price-per-hour 1.80

The seconds are your pilot's (`jobs.generate --pilot 1%` prints them, and its own forecast), or published ones: Stable
Diffusion 1.5 at 512x512 and 50 steps takes 1.06 s on an A100 compiled, 1.60 s not; SDXL-Turbo 0.207 s in one step.
The price is yours to look up. Idle time, loading and restarts are a share of the GPU hours (`benchmarks.schedule`).
"""

import argparse
import json

#: Its plan part is read, it is asked for its quarantine part (or this is put), its statistics and itself are put.
REQUESTS_A_SHARD = 4
SHARDS_A_GROUP = 1000


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=542_401)
    parser.add_argument("--seconds-an-image", type=float, required=True, help="CLIP's share included, where it has one")
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--price-per-hour", type=float, required=True, help="of one GPU, in your currency")
    parser.add_argument("--idle-share", type=float, default=0.05, help="of the GPU hours: loading, restarts, the end")
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--bytes-a-picture", type=int, default=265_000, help="a PNG of 512x512, as real photos have it")
    parser.add_argument("--bytes-of-features", type=int, default=132_600, help="of ViT-L/14")
    print(json.dumps(cost_guide(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
