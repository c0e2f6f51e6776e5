"""One HTML page about runs: what may be compared, tables, charts."""
