"""What users see of a running job: log lines, statistics, explanations."""
