"""Define the commands of `sisa`, one module for each command family.

cli.py            carries out a command line, and exits with its code
command.py        what all commands share: the root group, options, opening a model
input_files.py    reading what the command line names
daily.py          quickstart, init, train, add, generate, find, where, status, forget, verify,
                  export, config
quickstart.py     what `quickstart` and `init` do
plan.py           plan, simulate, routing
requests.py       request, run, report
rights.py         access, rectify, restrict, release, recipients, drop
evidence/         keys, log, certificate, receipt, prove, audit, rebuild, revocations, and their checks
patches.py        approx
evaluation/       eval
maintenance.py    doctor, gc, sweep, ledger, metrics
serve.py          serve, token, engines
jobs.py           cluster
"""
