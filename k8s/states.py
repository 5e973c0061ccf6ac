"""What a RayJob's two status fields mean for a run, and why its pods wait, in words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lorafleet.jobs.runs.run import RunState


@dataclass(frozen=True)
class JobState:
    """What a RayJob does."""

    run: RunState
    """The run's state, as far as the cluster knows."""
    sentence: str
    """For a user."""
    ended: bool = False
    """Whether nothing more happens to it."""


_DEPLOYMENT = {
    "": JobState(RunState.PENDING, "was created; the operator has not seen it yet"),
    "Initializing": JobState(RunState.PENDING, "waits for its pods"),
    "Waiting": JobState(RunState.PENDING, "waits for the command of a user (InteractiveMode)"),
    "Running": JobState(RunState.RUNNING, "runs"),
    "Suspending": JobState(RunState.PENDING, "was preempted, and is queued again"),
    "Suspended": JobState(RunState.PENDING, "is queued: nothing of it runs"),
    "Retrying": JobState(RunState.PENDING, "failed, and begins again on a new cluster"),
    "ValidationFailed": JobState(RunState.FAILED, "was refused by the operator", ended=True),
}
"""By jobDeploymentStatus; Complete and Failed depend on the jobStatus too (rayjob_types.go, IsJobTerminal)."""
_REASONS = {
    "SubmissionFailed": "the job could not be handed to Ray",
    "DeadlineExceeded": "it came to deadlines.hours",
    "PreRunningDeadlineExceeded": "it did not run within deadlines.start_minutes",
    "AppFailed": "its driver failed",
    "JobDeploymentStatusTransitionGracePeriodExceeded": "Ray and Kubernetes did not agree on its end",
    "JobStatusCheckTimeoutExceeded": "its head did not answer any more",
    "ValidationFailed": "the operator refused it",
}


def job_state(status: dict[str, Any] | None, *, queued: bool = False) -> JobState:
    """What a RayJob does, from its status; a new one has none at all.

    Complete is no success (a stopped job is Complete too), and FAILED with Retrying is not the end. `queued` says that
    a queue admits it: then a suspension is a preemption or the wait for admission.
    """
    status = status or {}
    deployment, job = str(status.get("jobDeploymentStatus") or ""), str(status.get("jobStatus") or "")
    why = why_it_ended(status)
    if deployment == "Complete":
        if job == "SUCCEEDED":
            return JobState(RunState.FINISHED, "has ended", ended=True)
        if job == "STOPPED":
            return JobState(RunState.STOPPED, "was stopped", ended=True)
        return JobState(RunState.FAILED, f"failed{why}", ended=True)
    if deployment == "Failed":
        if status.get("reason") == "DeadlineExceeded":
            return JobState(RunState.STOPPED, f"was ended{why}", ended=True)
        return JobState(RunState.FAILED, f"failed{why}", ended=True)
    if deployment == "Suspended" and not queued:
        return JobState(RunState.PENDING, "is suspended")
    known = _DEPLOYMENT.get(deployment)
    if known is None:
        return JobState(RunState.PENDING, f"is {deployment}, which this version does not know")
    if deployment in ("ValidationFailed", "Retrying"):
        return JobState(known.run, known.sentence + why, known.ended)
    if deployment == "Running" and job in ("", "PENDING"):
        return JobState(RunState.PENDING, "has its cluster, and starts the driver")
    return known


def why_it_ended(status: dict[str, Any]) -> str:
    """`: SENTENCE` from reason and message, or nothing."""
    reason, message = str(status.get("reason") or ""), str(status.get("message") or "").strip()
    parts = [_REASONS.get(reason, reason)] if reason else []
    if message:
        parts.append(message.splitlines()[0][:300])
    return ": " + "; ".join(parts) if parts else ""


_SHORT = re.compile(r"(\d+)/(\d+) nodes are available: (.*)", re.DOTALL)


def why_pending(events: list[dict[str, Any]]) -> str | None:
    """Why pods do not start, from the newest event that says so; None when none does."""
    for event in sorted(events, key=_when, reverse=True):
        message = " ".join(str(event.get("message") or "").split())
        reason = str(event.get("reason") or "")
        words = _in_words(reason, message)
        if words:
            return words
    return None


def _when(event: dict[str, Any]) -> str:
    known = (event.get("lastTimestamp"), event.get("eventTime"), (event.get("metadata") or {}).get("creationTimestamp"))
    return str(next(filter(None, known), ""))


def _in_words(reason: str, message: str) -> str | None:
    short = _SHORT.match(message)
    if reason == "FailedScheduling" and short:
        lacking = re.findall(r"Insufficient ([\w./-]*\w)", short[3])
        if lacking:
            what = " and ".join(dict.fromkeys(_resource(name) for name in lacking))
            return f"no node has enough {what} free ({short[1]} of {short[2]} nodes would do)"
        if "untolerated taint" in message:
            taint = re.search(r"untolerated taint \{([^}]*)\}", message)
            return f"its nodes have a taint that the site does not tolerate ({taint[1] if taint else 'see the events'})"
        if "node affinity" in message or "node selector" in message:
            return "no node has the labels of node_selector"
        if "persistentvolumeclaim" in message:
            return f"its storage is not there: {short[3][:200]}"
        return f"no node fits: {short[3][:200]}"
    if reason == "FailedScheduling":
        return f"it cannot be placed: {message[:200]}"
    if reason in ("Failed", "ErrImagePull", "ImagePullBackOff", "BackOff") and "image" in message.lower():
        return f"the image cannot be pulled: {message[:200]}"
    if reason in ("FailedMount", "FailedAttachVolume"):
        return f"a volume cannot be mounted: {message[:200]}"
    if reason in ("FailedCreate", "FailedCreatePod") or "exceeded quota" in message:
        what = "the namespace's quota is used up" if "exceeded quota" in message else "a pod was refused"
        return f"{what}: {message[:200]}"
    if reason in ("Pending", "QuotaReserved") and "quota" in message.lower():
        return f"its queue has no room: {message[:200]}"
    return None


def _resource(name: str) -> str:
    return {"cpu": "CPU", "memory": "memory", "ephemeral-storage": "disk"}.get(name, name)
