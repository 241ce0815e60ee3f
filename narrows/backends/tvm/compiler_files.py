"""The names of the files that the compiler's process reads and writes."""

JOB, WEIGHTS, RESULT = "job.json", "weights.npz", "result.json"
