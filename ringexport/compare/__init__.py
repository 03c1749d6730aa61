"""Compare runners: metrics, the table of tolerances, teacher forcing, perplexity and speed."""
