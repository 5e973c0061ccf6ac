"""The tests of a real Slurm once more, on 24.11 (Debian 13) and on the newest that Debian has.

Their root folders are made by debootstrap, once for a machine; the daemons and commands run in them
through chroot. Without debootstrap or a mirror the tests are skipped.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.conftest import JobMaker
from tests.slurm import (
    test_array,
    test_launch,
    test_living,
    test_plan,
    test_queue,
    test_states,
)
from tests.slurm.conftest import Login
from tests.slurm.rig import Rig

pytestmark = [
    pytest.mark.ray,
    pytest.mark.long,
    pytest.mark.parametrize("rig", ["trixie", "sid"], indirect=True),
]


def test_the_version_is_newer(rig: Rig) -> None:
    version = rig.asked("scontrol", "--version").split()[-1]
    assert tuple(map(int, version.split(".")[:2])) >= (24, 11)


@pytest.mark.parametrize(
    "check",
    [
        test_states.test_jobs_end_as_they_do,
        test_states.test_a_job_that_waits_says_why,
        test_states.test_a_requeued_job_is_counted,
        test_states.test_a_job_that_is_not_there,
    ],
)
def test_what_it_says_of_jobs(rig: Rig, check: Callable[[Rig], None]) -> None:
    check(rig)


@pytest.mark.parametrize(
    "check",
    [
        test_queue.test_list_follows_the_queue,
        test_plan.test_a_plan_is_folded_and_measured,
        test_plan.test_an_array_is_tested_and_counted,
        test_launch.test_a_sweep_over_two_nodes,
        test_launch.test_a_driver_that_fails,
        test_launch.test_a_head_of_its_own,
        test_array.test_an_array_and_one_report,
        test_living.test_a_preemption_with_notice,
        test_living.test_requeued_without_notice,
        test_living.test_cancelled_and_resumed,
    ],
)
def test_runs(login: Login, bert_job: JobMaker, check: Callable[[Login, JobMaker], None]) -> None:
    check(login, bert_job)
