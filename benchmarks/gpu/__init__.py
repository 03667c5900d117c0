"""What `make gpu` runs: build, parity, sanitizer, measurements, one table."""
