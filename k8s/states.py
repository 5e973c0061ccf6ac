"""Translate the status of a RayJob into the state of a run, and explain why its pods wait."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from lorafleet.jobs.runs.run import RunState


@dataclass(frozen=True)
class JobState:
    """State of a RayJob."""

    run: RunState
    """State of the run, as far as the cluster reports it."""
    sentence: str
    """Predicate for a message to the user, such as `waits for its pods`."""
    ended: bool = False
    """True if the state is final."""


_STATE_BY_DEPLOYMENT = {
    "": JobState(RunState.PENDING, "was created, but the operator has not handled it yet"),
    "Initializing": JobState(RunState.PENDING, "waits for its pods"),
    "Waiting": JobState(RunState.PENDING, "waits for a user's command (InteractiveMode)"),
    "Running": JobState(RunState.RUNNING, "runs"),
    "Suspending": JobState(RunState.PENDING, "was preempted and queued again"),
    "Suspended": JobState(RunState.PENDING, "is queued; none of its pods run"),
    "Retrying": JobState(RunState.PENDING, "failed and is being restarted on a new cluster"),
    "ValidationFailed": JobState(RunState.FAILED, "was rejected by the operator", ended=True),
}
"""State by jobDeploymentStatus. Complete and Failed also depend on jobStatus
(rayjob_types.go, IsJobTerminal).
"""
_REASONS = {
    "SubmissionFailed": "the job could not be submitted to Ray",
    "DeadlineExceeded": "it reached deadlines.hours",
    "PreRunningDeadlineExceeded": "it did not start within deadlines.start_minutes",
    "AppFailed": "its driver failed",
    "JobDeploymentStatusTransitionGracePeriodExceeded": (
        "Ray and Kubernetes report different end states"
    ),
    "JobStatusCheckTimeoutExceeded": (
        "its head did not answer for 300 seconds, and KubeRay does not restart such a job"
    ),
    "ValidationFailed": "the operator rejected it",
}


def parse_job_state(status: dict[str, Any] | None, *, queued: bool = False) -> JobState:
    """Return the state of a RayJob from its status; a new RayJob has none.

    Complete does not mean success: a stopped job is Complete too. A jobStatus of FAILED
    with Retrying is not final.

    Args:
        status: The status field of the RayJob.
        queued: True if a queue admits the job. A suspension is then a preemption or the
            wait for admission.
    """
    status = status or {}
    deployment, job = (
        str(status.get("jobDeploymentStatus") or ""),
        str(status.get("jobStatus") or ""),
    )
    reason = format_end_reason(status)
    if deployment == "Complete":
        if job == "SUCCEEDED":
            return JobState(RunState.FINISHED, "has ended", ended=True)
        if job == "STOPPED":
            return JobState(RunState.STOPPED, "was stopped", ended=True)
        return JobState(RunState.FAILED, f"failed{reason}", ended=True)
    if deployment == "Failed":
        # A deadline or a lost node says nothing about the job: like a time limit on Slurm it stops
        # the run, and `resume` continues it.
        if status.get("reason") in ("DeadlineExceeded", "JobStatusCheckTimeoutExceeded"):
            return JobState(RunState.STOPPED, f"was ended{reason}", ended=True)
        return JobState(RunState.FAILED, f"failed{reason}", ended=True)
    if deployment == "Suspended" and not queued:
        return JobState(RunState.PENDING, "is suspended")
    state = _STATE_BY_DEPLOYMENT.get(deployment)
    # A newer operator may have more states. Pending is the safe meaning: nothing is ended or
    # collected.
    if state is None:
        return JobState(
            RunState.PENDING,
            f"is {deployment}, a state that this version of lorafleet does not know",
        )
    if deployment in ("ValidationFailed", "Retrying"):
        return JobState(state.run, state.sentence + reason, state.ended)
    if deployment == "Running" and job in ("", "PENDING"):
        return JobState(RunState.PENDING, "has its cluster, and is starting the driver")
    return state


def format_end_reason(status: dict[str, Any]) -> str:
    """Return `: REASON` from the reason and message of a status, or an empty string.

    Only the first line of the message is used, because Ray appends the driver's last lines
    to it.
    """
    reason, message = str(status.get("reason") or ""), str(status.get("message") or "").strip()
    parts = [_REASONS.get(reason, reason)] if reason else []
    if message:
        parts.append(message.splitlines()[0][:300])
    return ": " + "; ".join(parts) if parts else ""


_NO_NODE = re.compile(r"(\d+)/(\d+) nodes are available: (.*)", re.DOTALL)


def find_pending_reason(events: list[dict[str, Any]]) -> str | None:
    """Return why pods do not start, from the newest event that explains it, or None.

    Newer events come first, because what an older one reports may be resolved. Events that
    explain nothing are skipped.

    Args:
        events: Events of the RayJob, its cluster, its pods and its queue, in any order.
    """
    for event in sorted(events, key=_get_event_time, reverse=True):
        message = " ".join(str(event.get("message") or "").split())
        reason = str(event.get("reason") or "")
        explanation = _explain_event(reason, message)
        if explanation:
            return explanation
    return None


def _get_event_time(event: dict[str, Any]) -> str:
    """Return the first available timestamp of an event, or an empty string."""
    timestamps = (
        event.get("lastTimestamp"),
        event.get("eventTime"),
        (event.get("metadata") or {}).get("creationTimestamp"),
    )
    return str(next(filter(None, timestamps), ""))


def _explain_event(reason: str, message: str) -> str | None:
    """Return an explanation of an event that keeps pods from starting, or None for other events."""
    match = _NO_NODE.match(message)
    if reason == "FailedScheduling" and match:
        missing = re.findall(r"Insufficient ([\w./-]*\w)", match[3])
        if missing:
            subject = " and ".join(dict.fromkeys(_format_resource(name) for name in missing))
            return f"no node has enough free {subject} ({match[1]} of {match[2]} nodes qualify)"
        if "untolerated taint" in message:
            taint = re.search(r"untolerated taint \{([^}]*)\}", message)
            return (
                "its nodes have a taint that the site does not tolerate "
                f"({taint[1] if taint else 'see the events'}): add it to tolerations in the site "
                "file"
            )
        if "node affinity" in message or "node selector" in message:
            return "no node has the labels of node_selector"
        if "persistentvolumeclaim" in message:
            return f"its storage is missing: {match[3][:200]}"
        return f"no node is suitable: {match[3][:200]}"
    if reason == "FailedScheduling":
        return f"it cannot be scheduled: {message[:200]}"
    if (
        reason in ("Failed", "ErrImagePull", "ImagePullBackOff", "BackOff")
        and "image" in message.lower()
    ):
        return f"the image cannot be pulled: {message[:200]}"
    if reason in ("FailedMount", "FailedAttachVolume"):
        return f"a volume cannot be mounted: {message[:200]}"
    if reason in ("FailedCreate", "FailedCreatePod") or "exceeded quota" in message:
        subject = (
            "the namespace's quota is used up"
            if "exceeded quota" in message
            else "a pod was rejected"
        )
        return f"{subject}: {message[:200]}"
    if reason in ("Pending", "QuotaReserved") and "quota" in message.lower():
        return f"its queue has no free quota: {message[:200]}"
    return None


def _format_resource(name: str) -> str:
    """Return the display name of a resource."""
    return {"cpu": "CPU", "memory": "memory", "ephemeral-storage": "disk"}.get(name, name)
