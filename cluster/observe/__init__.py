"""What a run shows: log lines, metrics and curves.

reporting     the events of a command, shown or logged    json_log   log lines, of driver and workers
ray_metrics   the same events as Prometheus's series      curves     kept metrics for TensorBoard, MLflow

Bars and lines of progress are in `sisa/flows/wiring/progress.py`; `sisa/store/metrics.py` keeps metrics.
"""
