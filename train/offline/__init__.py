"""What is done with checkpoints outside a run: plans, expansions, experts out of a dense model, evaluation."""
