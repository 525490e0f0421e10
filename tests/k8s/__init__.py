"""Checks of the Kubernetes manifests: rendered by `kubectl kustomize`, offline, and as pods that are started."""
