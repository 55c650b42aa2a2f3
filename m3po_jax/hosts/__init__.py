"""One room for several devices and hosts: mesh, rules, own rows, agreement, signals, start-up and the parent process.

It imports nothing here: `supervisor` must work in a process that never loads JAX.
"""
