"""What every operation stands on: the compiled module, devices, checks, random numbers."""
