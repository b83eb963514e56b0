"""Reads pictures from untrusted files, converts them to tensors, and writes pictures with metadata.

Call `reading.read_picture` for files that users send. It decodes every file in a separate process (`child`), with `decoding`,
`colours` and `bands`.
"""
