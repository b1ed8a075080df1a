"""Checks before a run: does it fit, and roughly how long does it take?

The jitted functions of stages (``plan.stage_programs``) are compiled with shapes in place of arrays, for the devices at
hand or for others that need not be there; the compiler says how much memory each takes.

- ``shapes``: models, known by their ``config.json`` alone;
- ``plan``: a configuration on a model, its programs, the bytes and hours that it takes;
- ``topology``: the devices, TPU slices and nodes of GPUs included; ``collectives``: what a program makes devices send;
- ``rates``: the speed of this machine, measured.
"""
