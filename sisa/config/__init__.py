"""The run file: its fields and blocks, its YAML, its template."""
