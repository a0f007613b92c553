"""A job's statistics as one page for people. No torch."""
