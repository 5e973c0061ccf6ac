"""Rungs, expressions, schedules, placement: numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafleet.cluster.ray.nodes import build_worker_environment, parse_nodes
from lorafleet.jobs.errors import PlacementRefused, SpecProblems
from lorafleet.jobs.schema import expressions as expression
from lorafleet.jobs.schema.job import TrainSpec
from lorafleet.jobs.schema.types import Goal
from lorafleet.jobs.sites.base import LocalSite, Node, RaySite
from lorafleet.jobs.sites.placement import (
    Share,
    compute_placement,
    count_concurrent_trials,
    fit_placement,
)
from lorafleet.jobs.trials import asha as rungs
from lorafleet.jobs.trials.schedule import build_schedule
from tests.conftest import JobMaker


def test_rungs_are_powers_of_the_reduction_factor_and_end_at_max_t() -> None:
    assert rungs.compute_rung_levels(223, 2000, 3) == [223, 669, 2000]
    assert rungs.compute_rung_levels(1, 27, 3) == [1, 3, 9, 27]


def test_a_rung_in_the_second_half_is_left_out() -> None:
    assert rungs.compute_rung_levels(222, 2000, 3) == [
        222,
        666,
        2000,
    ]  # 1998 would cut two rows before the end


def test_the_default_grace_period_leaves_two_cuts() -> None:
    assert rungs.compute_rung_levels(rungs.compute_default_grace_period(2000, 3), 2000, 3) == [
        223,
        669,
        2000,
    ]


def places(*scores: float, goal: Goal = "maximize") -> list[rungs.RungScore]:
    return [rungs.make_rung_score(score, 0.5, goal) for score in scores]


@pytest.mark.parametrize(
    ("part", "trials_per_gpu"),
    [(1, 1), (0.5, 2), (0.34, 2), (0.33, 3), (0.2, 5), (0.1, 10), (0.01, 100)],
)
def test_trials_share_gpus(part: float, trials_per_gpu: int, bert_job: JobMaker) -> None:
    """Two machines with 2 GPUs each; the parts of one GPU are never more than the GPU."""
    nodes = tuple(Node(name=name, cpus=256, memory_gib=512, gpus=2) for name in ("a", "b"))
    site = RaySite(address="auto", nodes=nodes, gpu_memory_gib=80)
    job = bert_job(resources__gpus_per_trial=part).job
    placement = compute_placement(job, site, 1000, 0.1)
    assert placement.slots == 4 * trials_per_gpu
    assert placement.used_gpus == 4
    assert placement.ray_gpus * trials_per_gpu <= 1
    assert placement.ray_gpus * trials_per_gpu == pytest.approx(1, abs=0.01)
    assert placement.gpus == pytest.approx(1 / trials_per_gpu)
    assert placement.model_validate_json(placement.model_dump_json()) == placement
    few, message = fit_placement(placement, nodes[:1])
    if trials_per_gpu > 1:
        assert f"1 CPU core and 1/{trials_per_gpu} of a GPU" in str(message)
    assert few.slots == 2 * trials_per_gpu


def test_a_part_of_a_gpu_needs_a_gpu(bert_job: JobMaker) -> None:
    job = bert_job(resources__gpus_per_trial=0.5).job
    with pytest.raises(PlacementRefused, match=r"gpus_per_trial is 0.5, but this machine has no"):
        compute_placement(job, LocalSite(cpus=8, memory_gib=16), 4, 0.1)


def fill(scores: list[rungs.RungScore]) -> rungs.Rung:
    """A rung with scores of trials "0", "1", ... in the order of their arrival."""
    rung = rungs.Rung()
    for name, score in enumerate(scores):
        rung.add(str(name), score)
    return rung


def pick(scores: list[rungs.RungScore], eta: int = 3) -> list[bool]:
    """Which of the trials pass a rung that has all these scores."""
    rung = fill(scores)
    return [rung.is_promoted(str(name), eta) for name in range(len(scores))]


def test_the_second_rung_keeps_the_best_third() -> None:
    six = places(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, goal="minimize")
    assert fill(six).compute_cutoff(3) == six[4]  # 6 / 3 = 2 kept: 0.4 and 0.5


def test_the_first_to_arrive_goes_on_and_the_second_must_beat_it() -> None:
    assert pick(places(0.5)) == [True]
    assert pick(places(0.5, 0.6)) == [False, True]
    assert pick(places(0.5, 0.4)) == [True, False]


def test_ties_go_on_and_nan_never_does() -> None:
    assert pick(places(0.5, 0.5, 0.5)) == [True, True, True]
    assert pick(places(math.nan)) == [False]
    assert fill(places(math.nan, 0.2)).compute_cutoff(3) == places(0.2)[0]
    assert pick([rungs.make_rung_score(None, 0.1, "maximize")]) == [False]


def test_between_equal_scores_the_lower_loss_goes_on() -> None:
    majority = [rungs.make_rung_score(0.58, loss, "maximize") for loss in (0.690, 0.658, 0.687)]
    assert pick(majority) == [False, True, False]
    assert pick([*majority, rungs.make_rung_score(0.59, 0.7, "maximize")])[-1]
    assert not pick([*majority, rungs.make_rung_score(0.58, math.nan, "maximize")])[-1]


def test_a_rung_without_scores_has_no_cutoff() -> None:
    with pytest.raises(ValueError, match="no cutoff"):
        rungs.Rung().compute_cutoff(3)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from([0.1, 0.2, 0.3, math.nan]))),
    st.integers(2, 5),
)
def test_a_rung_decides_like_a_sorted_list(arrivals: list[tuple[int, float]], eta: int) -> None:
    rung, scores = rungs.Rung(), {}
    for name, score in arrivals:  # a later score of a trial replaces the earlier one
        scores[str(name)] = rungs.make_rung_score(score, 0.5, "maximize")
        rung.add(str(name), scores[str(name)])
        kept = sorted(scores.values(), reverse=True)[: max(1, len(scores) // eta)]
        assert rung.compute_cutoff(eta) == kept[-1]
        for other, own in scores.items():
            assert rung.is_promoted(other, eta) == (own[0] > -math.inf and own >= kept[-1])


def test_expected_survivors_of_three_arrivals_by_hand() -> None:
    assert rungs.estimate_survivors(3, 3) == pytest.approx(1 + 1 / 2 + 1 / 3)
    assert rungs.estimate_time(3, [1, 3], 3) == pytest.approx(3 * 1 + (1 + 1 / 2 + 1 / 3) * 2)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=40), st.integers(2, 5))
def test_at_least_one_and_at_most_a_share_plus_ties_pass_a_full_rung(
    scores: list[float], eta: int
) -> None:
    passing = [
        score for score, passes in zip(scores, pick(places(*scores), eta), strict=True) if passes
    ]
    assert max(scores) in passing
    assert len(set(passing)) <= max(1, len(scores) // eta)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2*lora_r", 32),
        ("lora_r/2", 8),
        ("max(8, lora_r//4)", 8),
        ("-lora_r + 20", 4),
        ("lora_r * 1.5", 24),
    ],
)
def test_expressions(text: str, value: float) -> None:
    result = expression.evaluate(expression.parse(text), {"lora_r": 16})
    assert result == value
    assert isinstance(result, int)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "9**9**9",
        "lora_r.__class__()",
        "[1][0]",
        "lambda: 1",
        "'a'*9",
        "x if y else z",
        "a and b",
        "open('x')",
        "(1).real",
        "f'{x}'",
        "True + 1",
        "",
        "1;2",
        "max()",
        "max(x, key=y)",
    ],
)
def test_what_is_not_arithmetic_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expression|may only contain|not a field name"):
        tree = expression.parse(text)
        expression.evaluate(tree, dict.fromkeys(expression.find_names(tree), 1))


@given(st.text(max_size=60))
def test_no_text_makes_the_parser_do_anything_but_refuse(text: str) -> None:
    try:
        tree = expression.parse(text)
    except ValueError:
        return
    try:
        result = expression.evaluate(tree, dict.fromkeys(expression.find_names(tree), 3))
    except (ZeroDivisionError, OverflowError):
        return
    assert isinstance(result, int | float)


def test_accumulation_is_derived_from_the_global_batch() -> None:
    train = TrainSpec(per_device_train_batch_size=4, global_batch_size=32)
    assert train.compute_accumulation_steps(2) == 4
    with pytest.raises(SpecProblems, match=r"4 x 3 = 12"):
        train.compute_accumulation_steps(3)


ASHA = """
search:
  num_samples: 6
  scheduler: {type: asha, time_attr: samples, max_t: 144, reduction_factor: 3}
  parameters: {train.learning_rate: {distribution: log_uniform_values, min: 1e-4, max: 1e-2}}
"""


def test_a_searched_trial_is_evaluated_at_its_rungs(bert_job: JobMaker) -> None:
    plan = build_schedule(bert_job(ASHA).job, 256, searching=True)
    assert plan.rung_levels == (16, 48, 144)  # 144 / 9, times 3, times 3
    assert plan.rung_steps == (2, 6, 18)  # 8 rows a step
    assert [plan.find_next_evaluation(step) for step in (0, 1, 2, 6, 18)] == [2, 2, 6, 18, 18]
    assert [plan.find_next_evaluation(step) for step in (0, 2, 17, 18)] == [2, 6, 18, 18]


def test_train_does_not_look_at_the_search(bert_job: JobMaker) -> None:
    plan = build_schedule(bert_job(ASHA).job, 256, searching=False)
    assert (plan.total_steps, plan.rung_steps) == (8, (8,))


def test_epochs_become_steps(bert_job: JobMaker) -> None:
    job = bert_job(train__max_steps=None, train__num_train_epochs=1.5).job
    assert (
        build_schedule(job, 250, searching=False).total_steps == 48
    )  # 32 steps an epoch of 250 rows, 8 a step
    epochs = bert_job(
        ASHA, search__scheduler={"time_attr": "epoch", "max_t": 9, "grace_period": 1}
    ).job
    assert build_schedule(epochs, 80, searching=True).rung_steps == (10, 30, 90)


LAPTOP = LocalSite(cpus=4, memory_gib=16.0)
BOX = LocalSite(cpus=32, memory_gib=256.0, gpus=4, gpu_memory_gib=80.0)


def test_trials_share_a_machine_by_what_is_scarcest(bert_job: JobMaker) -> None:
    job = bert_job(ASHA).job
    assert (
        compute_placement(job, LAPTOP, 10, 1.0).slots,
        compute_placement(job, LAPTOP, 10, 1.0).waves,
    ) == (4, 3)
    assert compute_placement(job, LAPTOP, 10, 6.0).slots == 2
    assert compute_placement(job, LAPTOP, 10, 6.0).limited_by == "memory"
    assert compute_placement(job, LAPTOP, 3, 1.0).limited_by == "trials"
    assert (
        compute_placement(
            bert_job(ASHA, search__max_concurrent_trials=2).job, LAPTOP, 10, 1.0
        ).slots
        == 2
    )


@pytest.mark.parametrize(
    ("changes", "trials", "slots", "cpus"),
    [
        ({}, 1, 1, 4),  # a training alone has the whole machine
        ({}, 2, 2, 2),
        ({}, 3, 3, 1),
        ({}, 10, 4, 1),
        ({"search__max_concurrent_trials": 2}, 10, 2, 2),
        ({"resources__workers_per_node": 2}, 1, 1, 2),
        ({"resources__workers_per_node": 3}, 1, 1, 1),
        ({"resources__cpus_per_worker": 3}, 1, 1, 3),
        ({"resources__cpus_per_worker": 1}, 1, 1, 1),
    ],
)
def test_the_cores_are_divided_by_the_trials_that_run_at_once(
    bert_job: JobMaker, changes: dict[str, Any], trials: int, slots: int, cpus: int
) -> None:
    placement = compute_placement(bert_job(ASHA, **changes).job, LAPTOP, trials, 1.0)
    assert (placement.slots, placement.cpus_per_worker) == (slots, cpus)
    assert placement.has_auto_cpus is ("resources__cpus_per_worker" not in changes)


def test_the_cores_beside_gpus_are_divided_too(bert_job: JobMaker) -> None:
    placement = compute_placement(bert_job(ASHA).job, BOX, 10, 1.0)
    assert (placement.slots, placement.cpus_per_worker) == (4, 8)
    placement = compute_placement(bert_job(ASHA).job, BOX, 3, 1.0)
    assert (placement.slots, placement.cpus_per_worker) == (3, 10)


def test_a_cluster_that_others_may_use_gives_what_is_needed(bert_job: JobMaker) -> None:
    cluster = RaySite(address="auto", nodes=machines((0, 0), (8, 4), (6, 4)))
    placement = compute_placement(bert_job(ASHA).job, cluster, 4, 1.0)
    assert (placement.slots, placement.cpus_per_worker) == (4, 1)


def test_machines_with_fewer_cores_than_promised_get_smaller_shares(bert_job: JobMaker) -> None:
    """A share of the cores is no need: the trials run with fewer."""
    promised = RaySite(address="auto", nodes=machines((16, 4), (16, 4)))
    placement = compute_placement(bert_job(ASHA).job, promised, 10, 1.0)
    assert placement.slots == 8
    # As on nodes of one's own.
    placement = placement.model_copy(update={"cpus_per_worker": 4, "has_auto_cpus": True})
    found, notice = fit_placement(placement, machines((15, 4), (12, 4)))
    assert (found.slots, found.cpus_per_worker, notice) == (8, 3, None)
    found, notice = fit_placement(placement, machines((15, 4)))
    assert (found.slots, found.cpus_per_worker) == (4, 3)
    assert notice is not None
    needed = compute_placement(bert_job(ASHA, resources__cpus_per_worker=4).job, promised, 10, 1.0)
    found, notice = fit_placement(needed, machines((15, 4), (12, 4)))
    assert (found.slots, found.cpus_per_worker) == (6, 4)
    assert notice is not None


def test_gpus_are_used_where_they_are(bert_job: JobMaker) -> None:
    place_on_box = compute_placement(
        bert_job(ASHA, resources__workers_per_node=2).job, BOX, 10, 1.0
    )
    assert (place_on_box.slots, place_on_box.gpus_per_worker, place_on_box.limited_by) == (
        2,
        1,
        "GPUs",
    )
    assert compute_placement(bert_job(ASHA, resources__device="cpu").job, BOX, 64, 1.0).slots == 32


@pytest.mark.parametrize(
    ("resources", "sentence"),
    [
        ({"workers_per_node": 8}, "each trial needs 8 CPU cores, but this machine has 4"),
        ({"device": "cuda"}, "resources.device is cuda, but this machine has no usable GPU"),
        ({"gpus_per_node": 1}, "resources.gpus_per_node is 1, but this machine has no usable GPU"),
        (
            {"num_nodes": 2},
            "each trial needs 2 nodes x 1 CPU core, but this is a single machine: start Ray on each",
        ),
    ],
)
def test_what_cannot_fit_is_refused_in_one_sentence(
    bert_job: JobMaker, resources: dict[str, object], sentence: str
) -> None:
    with pytest.raises(PlacementRefused, match=sentence):
        compute_placement(bert_job(resources=resources).job, LAPTOP, 1, 1.0)


def machines(*shapes: tuple[int, int]) -> tuple[Node, ...]:
    """Nodes of (CPU cores, GPUs)."""
    return tuple(
        Node(name=f"n{i}", cpus=c, gpus=g, memory_gib=64) for i, (c, g) in enumerate(shapes)
    )


@pytest.mark.parametrize(
    ("nodes", "share", "expected"),
    [
        (machines((8, 4), (8, 4)), Share(2, 4, 4), 1),
        (
            machines((0, 0), (8, 4), (8, 4), (8, 4)),
            Share(2, 4, 4),
            1,
        ),  # the third machine has no partner
        (machines((8, 8), (8, 4), (8, 4)), Share(2, 4, 4), 2),  # the large one takes part in both
        (machines((16, 16), (8, 4)), Share(2, 4, 4), 1),  # a trial is on different machines
        (machines((8, 0), (8, 0), (8, 0)), Share(3, 2, 0), 4),
        (machines((8, 0)), Share(2, 1, 0), 0),
        (machines((2, 8)), Share(1, 4, 1), 0),
        ((), Share(1, 1, 0), 0),
    ],
)
def test_groups_of_machines_are_counted(
    nodes: tuple[Node, ...], share: Share, expected: int
) -> None:
    assert count_concurrent_trials(nodes, share) == expected


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), max_size=5),
    st.builds(Share, st.integers(1, 4), st.integers(1, 3), st.integers(0, 3)),
)
def test_counted_groups_can_be_laid_out_and_one_more_cannot(
    shapes: list[tuple[int, int]], share: Share
) -> None:
    """Beside a layout that takes the machines with most room left, which is the best one for equal
    shares.
    """
    left = [share.count_on(node) for node in machines(*shapes)]
    laid = 0
    while sum(room > 0 for room in left) >= share.nodes:
        for index in sorted(range(len(left)), key=lambda i: -left[i])[: share.nodes]:
            left[index] -= 1
        laid += 1
    assert count_concurrent_trials(machines(*shapes), share) == laid


def test_a_trial_over_machines_is_a_gang(bert_job: JobMaker) -> None:
    gpus = {"num_nodes": 2, "workers_per_node": 4}
    cluster = RaySite(address="auto", nodes=machines((0, 0), (8, 4), (8, 4), (8, 4)))
    job = bert_job(ASHA, resources=gpus).job
    placement = compute_placement(job, cluster, 10, 1.0)
    assert (placement.workers, placement.num_nodes, placement.slots, placement.spread) == (
        8,
        2,
        1,
        "PACK",
    )
    assert (
        compute_placement(bert_job(ASHA, resources={"num_nodes": 2}).job, cluster, 10, 1.0).spread
        == "STRICT_SPREAD"
    )
    assert compute_placement(bert_job(ASHA).job, cluster, 10, 1.0).spread == "STRICT_PACK"
    with pytest.raises(
        PlacementRefused,
        match="needs 2 nodes x 9 CPU cores and 9 GPUs, but the Ray at auto has n0: 0",
    ):
        compute_placement(
            bert_job(ASHA, resources={"num_nodes": 2, "workers_per_node": 9}).job, cluster, 1, 1.0
        )
    with pytest.raises(
        PlacementRefused,
        match=r"about 100\.0 GiB of memory on each machine, but the Ray at auto has only 64",
    ):
        compute_placement(job, cluster, 10, 200.0)


def test_a_placement_is_fitted_to_the_machines_that_came_up(bert_job: JobMaker) -> None:
    job = bert_job(ASHA, resources={"num_nodes": 2, "workers_per_node": 4}).job
    placement = compute_placement(
        job, RaySite(address="auto", nodes=machines(*[(8, 4)] * 6)), 10, 1.0
    )
    assert fit_placement(placement, machines(*[(8, 4)] * 6)) == (placement, None)
    fewer, sentence = fit_placement(placement, machines(*[(8, 4)] * 3))
    assert (fewer.slots, fewer.waves) == (1, 12)
    assert sentence == (
        "each trial needs 2 nodes x 4 CPU cores and 4 GPUs; the cluster has room for 1 such group; running 1 in parallel"
    )
    with pytest.raises(
        PlacementRefused, match=r"the cluster has room for 0 such groups \(8 CPU cores and 4 GPUs\)"
    ):
        fit_placement(placement, machines((8, 4)))


def test_a_trial_stays_on_machines_with_its_labels(bert_job: JobMaker) -> None:
    train, evaluate = ({"labels": {"pool": name, "zone": "a"}} for name in ("train", "evaluate"))
    nodes = tuple(
        node.model_copy(update=train if i else evaluate)
        for i, node in enumerate(machines(*[(8, 4)] * 3))
    )
    cluster = RaySite(address="auto", nodes=nodes)
    wants = {"num_nodes": 2, "workers_per_node": 4}
    placement = compute_placement(
        bert_job(ASHA, resources=wants | {"label_selector": {"pool": "train"}}).job,
        cluster,
        10,
        1.0,
    )
    assert (placement.slots, placement.labels) == (1, {"pool": "train"})
    assert fit_placement(placement, nodes) == (placement, None)
    with pytest.raises(PlacementRefused, match="the cluster has room for 0 such groups"):
        fit_placement(placement, nodes[:2])
    with pytest.raises(
        PlacementRefused,
        match="needs 2 nodes x 4 CPU cores and 4 GPUs, but the Ray at auto has 8 CPU",
    ):
        compute_placement(
            bert_job(resources=wants | {"label_selector": {"pool": "evaluate"}}).job,
            cluster,
            1,
            1.0,
        )
    for site in (cluster, LAPTOP):
        with pytest.raises(PlacementRefused, match="requires machines with pool=tain, zone=a, but"):
            compute_placement(
                bert_job(resources={"label_selector": {"pool": "tain", "zone": "a"}}).job,
                site,
                1,
                1.0,
            )


def test_workers_get_the_network_settings_and_no_secret() -> None:
    given = {
        "NCCL_SOCKET_IFNAME": "ib0",
        "GLOO_SOCKET_IFNAME": "ib0",
        "HF_HOME": "/hf",
        "HF_TOKEN": "s",
        "PATH": "/",
    }
    given |= {
        "LORAFLEET_CACHE": "/c",
        "LORAFLEET_API_KEY": "s",
        "WANDB_API_KEY": "s",
        "NCCL_SECRET": "s",
    }
    kept = {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "HF_HOME", "LORAFLEET_CACHE"}
    assert set(build_worker_environment(given)) == kept


def test_only_machines_that_answer_count() -> None:
    row = {"NodeManagerHostname": "h", "NodeManagerAddress": "10.0.0.1", "NodeManagerPort": 7}
    alive = row | {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 2.0, "memory": 2.0**31}}
    assert parse_nodes([alive, row | {"Alive": False, "Resources": {}}]) == (
        Node(name="h (10.0.0.1:7)", cpus=4, gpus=2, memory_gib=2.0),
    )
