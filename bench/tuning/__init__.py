"""What the tuner of launch tables tries, times and chooses; `python -m bench.tune` runs it on a GPU."""
