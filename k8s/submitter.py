"""Create the objects of a submission on the cluster, or take them back."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafleet.cluster.submission import SubmissionRecord, record_submission, update_record
from lorafleet.jobs import files
from lorafleet.jobs.errors import RunError
from lorafleet.jobs.extras import get_ray_version
from lorafleet.jobs.runs.bundle import TEXTS, pack
from lorafleet.jobs.runs.plan import MANIFEST
from lorafleet.jobs.runs.run import Run
from lorafleet.jobs.sites.kubernetes import KubernetesSite
from lorafleet.k8s.errors import ClusterError, Conflict
from lorafleet.k8s.render import CALL_ANNOTATION, RenderContext, render, to_yaml
from lorafleet.k8s.storage_pod import get_account

if TYPE_CHECKING:
    from lorafleet.k8s.client import Client, Tree


def make_submission_record(
    site: KubernetesSite, nodes: int, submission: int, call: str = ""
) -> SubmissionRecord:
    """Return the record of a submission.

    Args:
        site: The site.
        nodes: Nodes of the job.
        submission: Number of the submission.
        call: Mark of the call. Empty: a new one.
    """
    return SubmissionRecord(
        kind=site.kind,
        site=site.model_dump(mode="json"),
        nodes=nodes,
        submission=submission,
        call=call or secrets.token_hex(8),
    )


def build_render_context(
    site: KubernetesSite,
    run: str,
    submission: int,
    nodes: int,
    texts: dict[str, str],
    call: str = "",
) -> RenderContext:
    """Return what the objects of a submission are rendered from.

    Args:
        site: The site.
        run: Id of the run.
        submission: Number of the submission.
        nodes: Nodes of the job.
        texts: What `pack` returned for the run.
        call: Mark of the call, which its objects carry.
    """
    return RenderContext(
        run=run,
        submission=submission,
        nodes=nodes,
        texts=texts,
        ray_version=get_ray_version(),
        user=site.user or get_account(),
        call=call,
    )


@dataclass(frozen=True)
class Submitter:
    """Creates the objects of submissions. A call that is repeated recognises its own objects."""

    site: KubernetesSite
    client: Client

    def submit(self, run: Run, record: SubmissionRecord) -> None:
        """Create the objects of a submission.

        Their names and the mark of this call are recorded first, so that a repeated call
        recognises its own objects.

        Raises:
            RunError: An object of the same name exists, and another call created it.
            ClusterError: The cluster refuses an object, or does not answer.
        """
        texts = {name: (run.path / name).read_text() for name in TEXTS}
        packed = pack(str(run.read_status().name), texts, record.submission, get_ray_version())
        context = build_render_context(
            self.site, run.id, record.submission, record.nodes, packed, record.call
        )
        objects = render(self.site, context)
        files.write_text(run.path / MANIFEST, to_yaml(objects))
        record_submission(run, record)
        try:
            *other_objects, job = [self._create_object(tree, record.call) for tree in objects]
            # Owned objects are deleted with the RayJob. They are created before it, and its uid is
            # known only now.
            for tree in other_objects:
                self.client.set_owner(job, tree["kind"], tree["metadata"]["name"])
        except BaseException as error:
            # Without an answer it is unknown whether an object exists. Nothing is deleted then:
            # `resume` finds out.
            is_unanswered = isinstance(error, ClusterError) and not error.is_refused
            taken_back = not is_unanswered and self._delete_created_objects(objects, record.call)
            update_record(run, record.submission, taken_back=taken_back)
            raise
        update_record(run, record.submission, handed_over=True)

    def _create_object(self, tree: Tree, call: str) -> Tree:
        """Create an object, or return the one that the same call created before.

        The request is repeated if an answer is lost, and then meets the object of the first
        try.

        Args:
            tree: The object, with the mark of the call among its annotations.
            call: The mark.

        Raises:
            RunError: An object of this name exists, and another call created it.
        """
        kind, name = tree["kind"], tree["metadata"]["name"]
        try:
            return {"kind": kind, "apiVersion": tree["apiVersion"]} | self.client.create(tree)
        except Conflict as error:
            existing = self.client.get(kind, name)
            if existing is None or not _is_from_call(existing, call):
                conflict = f"a {kind} {name} exists already, and another command created it"
                raise RunError(f"{conflict}: it was not changed") from error
            return {"kind": kind, "apiVersion": tree["apiVersion"]} | existing

    def _delete_created_objects(self, objects: list[Tree], call: str) -> bool:
        """Delete the objects that a call created; return whether surely none of them is left."""
        try:
            for tree in reversed(objects):
                existing = self.client.get(tree["kind"], tree["metadata"]["name"])
                if existing and _is_from_call(existing, call):
                    self.client.delete(tree["kind"], tree["metadata"]["name"])
        except ClusterError:
            return False
        return True


def _is_from_call(tree: Tree, call: str) -> bool:
    return bool((tree["metadata"].get("annotations") or {}).get(CALL_ANNOTATION) == call)
