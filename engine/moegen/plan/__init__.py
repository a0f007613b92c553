"""Every batch size and buffer, chosen before the run. No torch."""
