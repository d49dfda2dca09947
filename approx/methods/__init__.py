"""Methods of approximate unlearning, one per file: loss, hyper-parameters and source.

Families with several methods are folders; the others are files beside them.
"""
