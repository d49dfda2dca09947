"""Rights of a data subject beside erasure.

access        what is held of a person, and who received it
restriction   records that are stored and not served
drop          the deletion lists of California's DROP
"""
