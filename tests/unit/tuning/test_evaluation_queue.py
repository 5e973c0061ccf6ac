"""Which models are evaluated when, while a search ends."""

from __future__ import annotations

from lorafleet.tuning.evaluation_queue import EvaluationQueue


def make_queue(*finalists: str, base: bool = True) -> EvaluationQueue:
    return EvaluationQueue(["base"] if base else [], lambda: ["base", *finalists])


def test_the_base_is_evaluated_while_trials_still_run() -> None:
    queue = make_queue("a", "b")
    assert queue.take(search_is_over=False) == ("base", 1)
    assert queue.take(search_is_over=False) is None
    assert not queue.is_empty()
    # It is still being evaluated when the search ends, and is not handed out again.
    assert queue.take(search_is_over=True) == ("a", 1)
    queue.complete("base")
    assert queue.take(search_is_over=True) == ("b", 1)
    assert queue.take(search_is_over=True) is None
    queue.complete("a")
    assert not queue.is_empty()
    queue.complete("b")
    assert queue.is_empty()
    assert queue.failed == {}


def test_the_search_is_ended_once() -> None:
    ended: list[str] = []

    def end_search() -> list[str]:
        ended.append("now")
        return []

    queue = EvaluationQueue([], end_search)
    assert not queue.is_empty()
    assert queue.take(search_is_over=False) is None
    for _ in range(3):
        assert queue.take(search_is_over=True) is None
    assert ended == ["now"]
    assert queue.is_empty()


def test_a_lost_process_is_tried_once_more() -> None:
    queue = make_queue("a", base=False)
    assert queue.take(search_is_over=True) == ("base", 1)
    queue.lose("base", "its process died")
    queue.complete("base")  # as Tune reports every end
    assert queue.take(search_is_over=True) == ("a", 1)
    assert queue.take(search_is_over=True) == ("base", 2)
    queue.lose("base", "its process died")
    assert queue.take(search_is_over=True) is None
    queue.complete("a")
    assert queue.is_empty()
    assert queue.failed == {"base": "its process died"}


def test_a_failure_costs_the_numbers_of_its_model() -> None:
    queue = make_queue("a", base=False)
    assert queue.take(search_is_over=True) == ("base", 1)
    queue.complete("base", "ValueError: no")
    assert queue.take(search_is_over=True) == ("a", 1)
    queue.complete("a")
    assert queue.is_empty()
    assert queue.failed == {"base": "ValueError: no"}


def test_a_finished_trial_is_evaluated_while_others_still_train() -> None:
    queue = make_queue("a", "b")
    assert queue.take(search_is_over=False) == ("base", 1)
    queue.add("a")
    queue.add("a")
    assert queue.take(search_is_over=False) == ("a", 1)
    queue.complete("a")
    assert queue.take(search_is_over=True) == ("b", 1)
    assert queue.take(search_is_over=True) is None


def test_a_trial_whose_weights_were_deleted_is_left_out() -> None:
    deleted: set[str] = set()
    queue = EvaluationQueue([], lambda: ["c"], lambda name: name not in deleted)
    for name in ("a", "b"):
        queue.add(name)
    assert queue.take(search_is_over=False) == ("a", 1)
    deleted |= {"a", "b"}
    queue.complete("a", "FileNotFoundError: adapter_config.json")
    assert queue.failed == {}
    assert queue.take(search_is_over=False) is None
    assert queue.take(search_is_over=True) == ("c", 1)
