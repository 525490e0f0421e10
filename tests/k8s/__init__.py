"""Checks of the Kubernetes manifests, offline, as `kubectl kustomize` renders them."""
