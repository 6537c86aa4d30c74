"""The arithmetic of the cost guide."""

import pytest

from benchmarks.cost_guide import CARDS, MODELS, PUBLISHED, UNKNOWN, cost_guide, main, published_table
from tests.helpers.paths import ROOT


def test_hours_money_bytes_and_requests() -> None:
    found = cost_guide(
        images=7200, seconds_an_image=0.5, gpus=2, price_per_hour=3.0, idle_share=0.5, shard_size=100,
        bytes_a_picture=900_000, bytes_of_features=100_000,
    )  # fmt: skip
    assert (found["gpu_hours"], found["hours"], found["money"]) == (2.0, 1.0, 6.0)
    assert (found["shards"], found["store_requests"], found["gigabytes"]) == (72, 289, 7.2)
    assert found["money_per_1000_images"] == 0.8333


def test_the_table_in_the_docs_is_the_one_that_the_command_prints() -> None:
    table = published_table({"L4": 1.0, "A100": 2.0, "H100": 4.0}, gpus=64, idle_share=0.05)
    assert "\n".join(table) in (ROOT / "docs/generate-at-scale.md").read_text()


def test_the_table_has_each_model_on_each_card_and_each_speed_its_source() -> None:
    rows = published_table(dict.fromkeys(CARDS, 1.0), gpus=64, idle_share=0.0)[2:]
    for model in MODELS:
        for card in CARDS:
            mine = [row for row in rows if row.startswith(f"| {model} | {card} |")]
            known = [one for one in PUBLISHED if (one.model, one.card) == (model, card)]
            assert len(mine) == max(1, len(known))
            assert all(one.source in row for one, row in zip(known, mine, strict=False)) or UNKNOWN in mine[0]
    assert {one.model for one in PUBLISHED} <= set(MODELS) and {one.card for one in PUBLISHED} <= set(CARDS)


def test_what_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for arguments, said in (
        ("--published --prices L4=1", "give --prices of L4, A100, H100"),
        ("--published --prices T4=1", "with a card of L4, A100, H100"),
        ("--seconds-an-image 1", "--price-per-hour"),
    ):
        monkeypatch.setattr("sys.argv", ["cost_guide", *arguments.split()])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2 and said in capsys.readouterr().err
