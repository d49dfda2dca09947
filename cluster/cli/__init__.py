"""Define the commands of `sisa`, one module for each command family: its arguments, words and JSON.

cli.py            carries out a command line, and exits with its code
command.py        what all commands share: the root group, options, opening a model
input_files.py    reading what the command line names
training.py       quickstart, init, train, add, export, config
quickstart.py     what `quickstart` and `init` do
plan.py           plan, simulate, routing
asking.py         status, find, where, generate
requests.py       forget, request, run, report
rights.py         access, rectify, restrict, release, recipients, drop
evidence/         keys, log, certificate, receipt, prove, audit, rebuild, revocations, and their checks
patches.py        approx
evaluation/       eval
maintenance.py    verify, sweep, doctor, gc, ledger, metrics
serve.py          serve, token, engines
jobs.py           cluster
"""
