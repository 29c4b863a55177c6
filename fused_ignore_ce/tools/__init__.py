"""What `python -m fused_ignore_ce` runs, and the measuring that it needs. No loss depends on it."""
