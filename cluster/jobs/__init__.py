"""Training as a job on a remote cluster: Ray Jobs, KubeRay manifests."""
