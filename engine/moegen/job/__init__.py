"""A job's life: its rows prepared, run and written; its record on disk; its runner."""
