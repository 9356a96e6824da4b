"""What the benchmark and comparison scripts are made of: step programs, timing, tables and figures."""
