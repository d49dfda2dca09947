"""Train, patch and evaluate as tasks on Ray.

session        the Ray that a command uses: its own, or a running one; `reaper` ends it with the command
executor       an executor that deals chains of stages to tasks; `tasks` runs them and tries again
attempt        one try of a task in a worker; `worker` trains there
nodes          which nodes may train, by their `proofs`   scheduling  which task starts next, and where
shared_base    the base, once on each node
patch_tasks, eval_tasks, scratch_tasks                    patches, evaluations, a base from scratch
"""
