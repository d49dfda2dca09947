"""Look at a model from outside.

verify            every held byte is the recorded one; a replay trains shards again
clean_process     trains stages again, each in a process that has trained nothing before
doctor            what is wrong in a model directory, by `findings`; `repair` mends it
garbage           retired and unknown files, listed and removed
residue           traces of deleted records, anywhere; `foreign_files` and `search_strings` read files
own_files         what a search of the model's own files finds of a deletion, for its certificate
lineage           whether a checkpoint was made of held records alone

`sisa audit`, which checks the evidence as well and signs a report, is `sisa/evidence/audit.py`.
"""
