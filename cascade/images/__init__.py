"""Pictures and files that people send, and pictures that are returned.

`reading` is the door: it has every file decoded in a process of its own (`child`), by `decoding` and `colours`.
"""
