"""One file per method of approximate unlearning: its loss, its hyper-parameters and their source."""
