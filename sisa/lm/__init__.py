"""The language model: the only code that imports torch.

base/       the frozen base, adapters on it, and what reaches their bits
train/      training one stage of one shard, to the byte
answer/     answers of many adapters in one forward pass
routing/    which shards answer a prompt
"""
