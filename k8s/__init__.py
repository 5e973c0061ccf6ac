"""Kubernetes: a job as a KubeRay RayJob, what the operator and the queues refuse, and what their states mean."""
