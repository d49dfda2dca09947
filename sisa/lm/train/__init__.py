"""Training one stage of one shard, to the byte.

trainer          the port: from a job, its parent and its records to the files of a checkpoint
steps            the records of each step, and progress with the mean loss of each pass
stage            one stage: its optimizer steps, and the files of its checkpoint
trainable        a base with the adapter to train, of which each stage gets a copy
losses           the loss of a micro-batch
packing          records end to end in one row
lora_linear      adapted linear maps
frozen_layers    the states that leave the layers below the adapted ones
lanes            micro-batches of several stages, computed together
lane_trial       whether that keeps their bits on this machine
self_test        whether this machine repeats training to the byte
"""
