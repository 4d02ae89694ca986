"""What a run's checkpoints hold, and how a run goes on from one."""
