"""Training one stage of one shard, to the byte."""
