"""The run file.

config      every key, with its meaning, its bounds and what a change costs
fields      what keys are made of: types of values, and their checks
sources     sources of records, and the names of their columns
runfile     YAML to config, or every problem with its line
paths       paths in a run file, and the user's state directory
template    the commented run file of `sisa init`
"""
