"""Training: crops from DALI, SwAV on a RegNet under Lightning, checkpoints, evaluation. Knows nothing of SLURM."""
