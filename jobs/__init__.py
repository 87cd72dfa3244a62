"""The life of a job: submit, supervise, watch, resume. Knows nothing of SwAV."""
