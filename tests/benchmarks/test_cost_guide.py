"""The arithmetic of the cost guide."""

from benchmarks.cost_guide import cost_guide


def test_hours_money_bytes_and_requests() -> None:
    found = cost_guide(
        images=7200, seconds_an_image=0.5, gpus=2, price_per_hour=3.0, idle_share=0.5, shard_size=100,
        bytes_a_picture=900_000, bytes_of_features=100_000,
    )  # fmt: skip
    assert (found["gpu_hours"], found["hours"], found["money"]) == (2.0, 1.0, 6.0)
    assert (found["shards"], found["store_requests"], found["gigabytes"]) == (72, 289, 7.2)
    assert found["money_per_1000_images"] == 0.8333
