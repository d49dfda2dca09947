"""Training as a job on a remote cluster, and manifests for Kubernetes.

job_flow    submit a training, follow it, stop it     jobs      the nouns, and the port to a cluster
ray_jobs    the port's real part: Ray's job API       kuberay   manifests for KubeRay
"""
