"""What losses cost: their time, side by side under pytest-benchmark, and the memory that they need at their peak."""
