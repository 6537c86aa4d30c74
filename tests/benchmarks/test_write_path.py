"""In each round the write stage stores every shard."""

from pathlib import Path
from unittest.mock import patch

from benchmarks.write_path import round_of, samples
from cluster.dataset.keys import shard_key, stats_key
from cluster.store.store import Store, open_store


def test_each_round_stores_its_shards(tmp_path: Path) -> None:
    store, table = open_store(tmp_path), samples(2, 1000)
    for _ in range(3):
        with patch.object(Store, "write_bytes", autospec=True, side_effect=Store.write_bytes) as put:
            round_of(store, table, 2)
        both_loops = [shard_key(0), shard_key(1)] * 2
        assert [call.args[1] for call in put.call_args_list] == both_loops
        assert store.exists(stats_key(1))
