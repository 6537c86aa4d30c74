"""Who gets which part of the machine: generators never lack a GPU because of CLIP, and everything can be scheduled."""

import pytest
import ray

from cluster.dataset.verify import verify
from cluster.dataset.vocabularies import clip_resources
from cluster.generation.pipeline import run_pipeline
from cluster.generation.pools import Pools
from cluster.generation.request import parse_node_label
from cluster.options import parse_count
from pcm.errors import InputError
from pcm.spec import ClipSpec
from tests.helpers.tiny_generation import null_spec, plan_dataset, write_corpus


def reserved(pools: Pools, kind: str) -> float:
    stages = [(pools.generators, "generator"), (pools.scorers, "scorer")]
    return sum(count * getattr(pools, f"{stage}_{kind}", 0) for count, stage in stages)


@pytest.mark.parametrize("gpus", [1, 2, 8, 64])
def test_a_generator_has_its_gpu_to_itself_and_scores_on_it(gpus: int) -> None:
    pools = Pools.for_cluster(device="cuda", cpus=4 * gpus, gpus=gpus)
    assert (pools.generators, pools.scorers) == (gpus, 0), "whatever GPU joins can draw, for nothing else takes it"
    assert pools.generator_gpus == 1
    assert reserved(pools, "cpus") <= 4 * gpus


@pytest.mark.parametrize("gpus", [2, 8, 17, 64])
def test_clip_may_have_gpus_of_its_own(gpus: int) -> None:
    pools = Pools.for_cluster(device="cuda", cpus=4 * gpus, gpus=gpus, clip_gpus=1)
    assert (pools.generator_gpus, pools.scorer_gpus) == (1, 1)
    assert reserved(pools, "gpus") == gpus, "none is idle, none is missing"
    assert pools.generators <= 16 * pools.scorers
    named = Pools.for_cluster(device="cuda", cpus=64, gpus=0, generators=32, scorers=3, clip_gpus=1)
    assert (named.generators, named.scorers) == (32, 3), "a cluster whose GPUs have not come yet"
    asked = Pools.for_cluster(device="cuda", cpus=64, gpus=8, scorers=2)
    assert (asked.generators, asked.scorers, asked.scorer_gpus) == (6, 2, 1)


@pytest.mark.parametrize(("generators", "clip_gpus", "scorers"), [(16, 1, 1), (17, 1, 2), (33, 1, 3), ((2, 24), 8, 2)])
def test_one_actor_of_clip_serves_sixteen_generators_that_were_named(
    generators: int | tuple[int, int], clip_gpus: int, scorers: int
) -> None:
    pools = Pools.for_cluster(device="cuda", cpus=64, gpus=64, generators=generators, clip_gpus=clip_gpus)
    assert pools.scorers == scorers


def test_gpus_for_clip_are_refused_where_none_are_used() -> None:
    with pytest.raises(InputError, match="--clip-gpus 1: is for GPUs"):
        Pools.for_cluster(device="cpu", cpus=4, gpus=0, clip_gpus=1)


@pytest.mark.parametrize("cpus", [1, 2, 16])
def test_every_stage_can_be_scheduled_on_a_cpu(cpus: int) -> None:
    for generators in (None, 1, 2 * cpus):
        pools = Pools.for_cluster(device="cpu", cpus=cpus, gpus=0, generators=generators)
        assert reserved(pools, "cpus") <= cpus * 1.2 and reserved(pools, "gpus") == 0


def test_generators_for_cpus_that_have_not_come_yet_spread_over_machines() -> None:
    """As on a cluster that had a CPU for each: with a tenth of a CPU, the first machine would take all of them."""
    pools = Pools.for_cluster(device="cpu", cpus=0, gpus=0, generators=3)
    assert pools.generator_cpus == 0.7495
    assert Pools.for_cluster(device="cpu", cpus=0, gpus=0, generators=1).generator_cpus == 0.6499


@pytest.mark.parametrize("planned", [1, 2, 3, 6, 7, 64, 1000])
@pytest.mark.parametrize("generators", [None, 1, 4, 100])
def test_generators_never_fill_a_machine(planned: int, generators: int | None) -> None:
    pools = Pools.for_cluster(device="cpu", cpus=planned, gpus=0, generators=generators, scorers=2)
    after = pools.score_options(9)["num_cpus"]
    assert after > 0, "a head without CPUs would take it"
    for cpus in (1, 2, 3, 4, 8, 16, 36, 48, 96, 128):
        full = int(cpus / pools.generator_cpus + 1e-9) * pools.generator_cpus
        assert cpus - full > 2 * after, (cpus, pools.generator_cpus)


def test_a_gpu_machine_with_a_cpu_for_each_gpu_has_room_for_scorers() -> None:
    pools = Pools.for_cluster(device="cuda", cpus=8, gpus=8, scorers=2)
    assert pools.generators == 6
    assert 8 * pools.generator_cpus + pools.scorers * pools.score_options(9)["num_cpus"] < 8


@pytest.mark.parametrize("scorers", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_generators_leave_a_place_for_what_comes_after_them_however_many_cpus_are_lost(
    tmp_path, ray_session: None, scorers: int | None
) -> None:  # type: ignore[no-untyped-def]
    """The run was planned for 6 CPUs, and 2 are there: two generators take both, two more wait."""
    pools = Pools.for_cluster(device="cpu", cpus=6, gpus=0, generators=4, scorers=scorers)
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path), null_spec(), shard_size=4)
    run_pipeline(store, plan, pools)
    assert verify(store)["stored"] == 24


def test_a_pool_with_a_least_and_a_most_grows() -> None:
    pools = Pools.for_cluster(device="cuda", cpus=64, gpus=0, generators=(2, 16))
    pool = pools.draw_options(100)["compute"]
    assert (pool.min_size, pool.max_size) == (2, 16)
    pool = pools.draw_options(1)["compute"]
    assert (pool.min_size, pool.max_size) == (1, 1), "no more actors than shards"
    fixed = Pools.for_cluster(device="cuda", cpus=64, gpus=0, generators=16).draw_options(100)["compute"]
    assert (fixed.min_size, fixed.max_size) == (16, 16)


def test_a_run_has_turns_for_all_that_the_lost_keep_and_the_left_out_give_back() -> None:
    alone = Pools.for_cluster(device="cuda", cpus=16, gpus=0, generators=3)
    assert (alone.turns(100), alone.turns(2)) == (100 + 3 * 4, 2 + 2 * 4)
    beside = Pools.for_cluster(device="cuda", cpus=16, gpus=0, generators=3, scorers=5)
    assert (beside.turns(100), beside.turns(2)) == (100 + 3 * 4 + 5 * 2, 2 + 2 * 4 + 2 * 2)


def test_a_node_label_holds_for_every_stage() -> None:
    label = parse_node_label("pcmnet.io/role=generation")
    pools = Pools.for_cluster(device="cuda", cpus=8, gpus=2, scorers=1, node_label=label)
    for options in (pools.draw_options(9), pools.score_options(9)):
        assert options["label_selector"] == {"pcmnet.io/role": "generation"}
    assert "label_selector" not in Pools.for_cluster(device="cuda", cpus=4, gpus=1).draw_options(9)
    clip = ClipSpec(model="null", revision="")
    assert clip_resources(clip, label)["label_selector"] == {"pcmnet.io/role": "generation"}
    assert "label_selector" not in clip_resources(clip)


def test_the_task_that_embeds_the_concepts_takes_no_whole_gpu() -> None:
    asked = [
        clip_resources(ClipSpec(model="null", revision="", device=device))["num_gpus"] for device in ("cpu", "cuda")
    ]
    assert asked[0] == 0 and 0 < asked[1] < 0.5


def test_arguments_are_read_or_refused_in_one_line() -> None:
    assert parse_count("8") == 8
    assert parse_count("2:8") == (2, 8)
    for text in ("", "0", "8:2", "0:4", "a", "1:", ":3", "1:2:3", "-1"):
        with pytest.raises(InputError, match="MIN:MAX"):
            parse_count(text)
    with pytest.raises(InputError, match="write KEY=VALUE"):
        parse_node_label("spot")


def test_a_growing_pool_on_labelled_nodes_makes_the_whole_dataset(tmp_path, ray_session: None) -> None:  # type: ignore[no-untyped-def]
    node = ray.nodes()[0]["Labels"]
    key = "ray.io/node-id"
    pools = Pools.for_cluster(device="cpu", cpus=2, gpus=0, generators=(1, 2), node_label=(key, node[key]))
    store, plan = plan_dataset(tmp_path / "data", write_corpus(tmp_path), null_spec(), shard_size=4)
    run_pipeline(store, plan, pools)
    report = verify(store)
    assert report["ok"] and report["stored"] == 24
