"""What a training step will need, before it runs: memory, work, time, and what fits a card."""
