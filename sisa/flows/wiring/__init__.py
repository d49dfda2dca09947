"""From a model directory to the parts that flows use."""
