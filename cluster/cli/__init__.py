"""Define the commands of `sisa`, one module for each command family.

cli.py            train, add, generate, find, where, status, forget, verify, export, config;
                  `run`, which carries out a command line, and its exit codes
command.py        what all of them share: the root group, options, opening a model, reading files
quickstart.py     what `quickstart` and `init` do
plan.py           plan, simulate, routing
requests.py       request, run
rights.py         access, rectify, restrict, release, recipients, drop
certificates.py   certificate, receipt, verify-certificate
evidence.py       keys, log, prove, verify-proof
audits.py         report, audit, rebuild, revocations, check-adapter
patches.py        approx
evaluation/       eval
maintenance.py    doctor, gc, sweep, ledger, metrics
serve.py          serve, token, engines
jobs.py           cluster
"""
