"""What `make gpu` runs on a machine with a GPU: build, parity, sanitizer, measurements, one table."""
