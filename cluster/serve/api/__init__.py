"""The endpoints of the service: one module for each group of calls, found by name (`app.py`)."""
