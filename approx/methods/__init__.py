"""Methods of approximate unlearning, one per file: loss, hyper-parameters and source."""
