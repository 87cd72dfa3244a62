"""The local S3 server and the local SLURM, for the demo and the tests, on one machine and in one folder."""

from jobs.local_s3 import OVERRIDES, S3, activate, environment, running_s3, start_s3, stop_s3

__all__ = ["OVERRIDES", "S3", "activate", "environment", "running_s3", "start_s3", "stop_s3"]
