"""Who answers a prompt, how well, and how fast."""
