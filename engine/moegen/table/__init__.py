"""Tables: input files read as one stream of rows, results written as deterministic parts."""
