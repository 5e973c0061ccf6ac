"""Kubernetes support: render, validate and follow a job as a KubeRay RayJob."""
