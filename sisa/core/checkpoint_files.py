"""Names of the files of a checkpoint: of a stage, or of a patch.

peft and other tools read the first two, in exports as well. An object store lends names for these files
alone: what a trainer or a patch maker stores must be here.
"""

ADAPTER_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "trainer_state.json"
MANIFEST_FILE = "manifest.json"
CHECKPOINT_FILES = (ADAPTER_FILE, CONFIG_FILE, OPTIMIZER_FILE, STATE_FILE, MANIFEST_FILE)
