"""Doors: one file for each library whose models reach the kernels by one line.

Nothing inside the package imports a door, a door patches nothing when it is imported, and what it
puts in place it can take back.
"""
