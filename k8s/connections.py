"""The clients of a site's cluster, created at their first use."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from lorafleet.jobs.sites.kubernetes import KubernetesSite

if TYPE_CHECKING:
    from lorafleet.k8s.client import Client


class Connections:
    """Two clients of one cluster. A manifest can be rendered without either."""

    def __init__(self, site: KubernetesSite) -> None:
        self.site = site

    @functools.cached_property
    def client(self) -> Client:
        """Return the cluster's client. Raises ClusterError if nothing says where the cluster is."""
        # Imported here: rendering a manifest without it takes half the time.
        from lorafleet.k8s.client import Client

        return Client(self.site.namespace, self.site.context)

    @functools.cached_property
    def quick_client(self) -> Client:
        """Return a client for what can be asked again later.

        It tries a cluster that does not answer twice, not for minutes. Raises ClusterError like
        `client`.
        """
        from lorafleet.k8s.client import Client

        return Client(self.site.namespace, self.site.context, max_retries=1)
